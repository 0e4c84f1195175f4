"""Data structures and what runs on them, as textbooks show them. Training material, tested by being importable."""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any


class Stack:
    """A last-in, first-out collection."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def push(self, item: Any) -> None:
        """Put an item on top of the stack."""
        self.items.append(item)

    def pop(self) -> Any:
        """Remove and return the item on top of the stack."""
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def peek(self) -> Any:
        """Return the item on top of the stack without removing it."""
        return self.items[-1]

    def is_empty(self) -> bool:
        """Return True if the stack has no items."""
        return not self.items

    def __len__(self) -> int:
        return len(self.items)


class Queue:
    """A first-in, first-out collection."""

    def __init__(self) -> None:
        self.items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        """Add an item at the end of the queue."""
        self.items.append(item)

    def get(self) -> Any:
        """Remove and return the item at the front of the queue."""
        return self.items.popleft()

    def __len__(self) -> int:
        return len(self.items)


class ListNode:
    """A node of a linked list."""

    def __init__(self, value: Any) -> None:
        self.value = value
        self.next: ListNode | None = None


class LinkedList:
    """A singly linked list."""

    def __init__(self) -> None:
        self.head: ListNode | None = None

    def append(self, value: Any) -> None:
        """Add a value at the end of the list."""
        node = ListNode(value)
        if self.head is None:
            self.head = node
            return
        current = self.head
        while current.next is not None:
            current = current.next
        current.next = node

    def to_list(self) -> list[Any]:
        """Return the values as a Python list."""
        values = []
        current = self.head
        while current is not None:
            values.append(current.value)
            current = current.next
        return values


class TreeNode:
    """A node of a binary search tree."""

    def __init__(self, key: int) -> None:
        self.key = key
        self.left: TreeNode | None = None
        self.right: TreeNode | None = None


def insert(root: TreeNode | None, key: int) -> TreeNode:
    """Insert a key into a binary search tree and return its root."""
    if root is None:
        return TreeNode(key)
    if key < root.key:
        root.left = insert(root.left, key)
    else:
        root.right = insert(root.right, key)
    return root


def in_order(root: TreeNode | None) -> list[int]:
    """Return the keys of a binary search tree in ascending order."""
    if root is None:
        return []
    return [*in_order(root.left), root.key, *in_order(root.right)]


def tree_height(root: TreeNode | None) -> int:
    """Return the number of levels of a binary tree."""
    if root is None:
        return 0
    return 1 + max(tree_height(root.left), tree_height(root.right))


def breadth_first_search(graph: dict[str, list[str]], start: str) -> list[str]:
    """Return the nodes reachable from start, nearest first."""
    seen = {start}
    queue = deque([start])
    order = []
    while queue:
        node = queue.popleft()
        order.append(node)
        for neighbour in graph[node]:
            if neighbour not in seen:
                seen.add(neighbour)
                queue.append(neighbour)
    return order


def depth_first_search(graph: dict[str, list[str]], node: str, seen: set[str]) -> set[str]:
    """Return the nodes reachable from a node, following each path to its end."""
    seen.add(node)
    for neighbour in graph[node]:
        if neighbour not in seen:
            depth_first_search(graph, neighbour, seen)
    return seen


def dijkstra(graph: dict[str, dict[str, float]], start: str) -> dict[str, float]:
    """Return the length of the shortest path from start to every node."""
    distances = {start: 0.0}
    queue = [(0.0, start)]
    while queue:
        length, node = heapq.heappop(queue)
        if length > distances[node]:
            continue
        for neighbour, weight in graph[node].items():
            candidate = length + weight
            if candidate < distances.get(neighbour, float("inf")):
                distances[neighbour] = candidate
                heapq.heappush(queue, (candidate, neighbour))
    return distances


@dataclass
class Point:
    """A point of the plane."""

    x: float
    y: float

    def distance_to(self, other: Point) -> float:
        """Return the distance to another point."""
        return ((self.x - other.x) ** 2 + (self.y - other.y) ** 2) ** 0.5  # type: ignore[no-any-return]


class Counter:
    """Counts how often something happened."""

    def __init__(self) -> None:
        self.count = 0

    def increment(self) -> int:
        """Add one and return the new count."""
        self.count += 1
        return self.count


class Account:
    """A bank account with a balance."""

    def __init__(self, owner: str, balance: float = 0) -> None:
        self.owner = owner
        self.balance = balance

    def deposit(self, amount: float) -> None:
        """Add an amount to the balance."""
        if amount <= 0:
            raise ValueError("the amount must be positive")
        self.balance += amount

    def withdraw(self, amount: float) -> None:
        """Take an amount from the balance."""
        if amount > self.balance:
            raise ValueError("the balance is too low")
        self.balance -= amount


def memoize(function: Callable[..., Any]) -> Callable[..., Any]:
    """Remember the results of a function."""
    cache: dict[tuple[Any, ...], Any] = {}

    @wraps(function)
    def wrapper(*args: Any) -> Any:
        if args not in cache:
            cache[args] = function(*args)
        return cache[args]

    return wrapper


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Print how long each call of a function takes."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        print(f"{function.__name__} took {time.perf_counter() - start:.3f} seconds")
        return result

    return wrapper


def flatten(nested: list[Any]) -> list[Any]:
    """Return the items of nested lists as one flat list."""
    flat = []
    for item in nested:
        if isinstance(item, list):
            flat.extend(flatten(item))
        else:
            flat.append(item)
    return flat


def group_by(items: list[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    """Group the items by what a function returns for them."""
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
