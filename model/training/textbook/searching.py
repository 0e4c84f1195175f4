"""Searching and sorting, as textbooks show them. Training material: read as text, and tested by being importable."""

from __future__ import annotations


def binary_search(items: list[int], target: int) -> int:
    """Return the index of target in a sorted list, or -1 if it is not there."""
    low = 0
    high = len(items) - 1
    while low <= high:
        middle = (low + high) // 2
        if items[middle] == target:
            return middle
        if items[middle] < target:
            low = middle + 1
        else:
            high = middle - 1
    return -1


def binary_search_recursive(items: list[int], target: int, low: int, high: int) -> int:
    """Return the index of target between low and high, or -1 if it is not there."""
    if low > high:
        return -1
    middle = (low + high) // 2
    if items[middle] == target:
        return middle
    if items[middle] < target:
        return binary_search_recursive(items, target, middle + 1, high)
    return binary_search_recursive(items, target, low, middle - 1)


def linear_search(items: list[int], target: int) -> int:
    """Return the index of the first item equal to target, or -1 if there is none."""
    for index, item in enumerate(items):
        if item == target:
            return index
    return -1


def bubble_sort(items: list[int]) -> list[int]:
    """Sort a list in place by swapping neighbours that are out of order."""
    for end in range(len(items) - 1, 0, -1):
        for index in range(end):
            if items[index] > items[index + 1]:
                items[index], items[index + 1] = items[index + 1], items[index]
    return items


def insertion_sort(items: list[int]) -> list[int]:
    """Sort a list in place by inserting each item where it belongs."""
    for index in range(1, len(items)):
        current = items[index]
        position = index
        while position > 0 and items[position - 1] > current:
            items[position] = items[position - 1]
            position -= 1
        items[position] = current
    return items


def selection_sort(items: list[int]) -> list[int]:
    """Sort a list in place by selecting the smallest remaining item each time."""
    for start in range(len(items)):
        smallest = start
        for index in range(start + 1, len(items)):
            if items[index] < items[smallest]:
                smallest = index
        items[start], items[smallest] = items[smallest], items[start]
    return items


def quicksort(items: list[int]) -> list[int]:
    """Return a sorted copy of a list, by partitioning it around a pivot."""
    if len(items) <= 1:
        return items
    pivot = items[len(items) // 2]
    smaller = [item for item in items if item < pivot]
    equal = [item for item in items if item == pivot]
    larger = [item for item in items if item > pivot]
    return quicksort(smaller) + equal + quicksort(larger)


def merge(left: list[int], right: list[int]) -> list[int]:
    """Merge two sorted lists into one sorted list."""
    result = []
    i = 0
    j = 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            result.append(left[i])
            i += 1
        else:
            result.append(right[j])
            j += 1
    return result + left[i:] + right[j:]


def merge_sort(items: list[int]) -> list[int]:
    """Return a sorted copy of a list, by sorting two halves and merging them."""
    if len(items) <= 1:
        return items
    middle = len(items) // 2
    return merge(merge_sort(items[:middle]), merge_sort(items[middle:]))


def find_max(items: list[int]) -> int:
    """Return the largest item of a list."""
    largest = items[0]
    for item in items:
        if item > largest:
            largest = item
    return largest


def find_min(items: list[int]) -> int:
    """Return the smallest item of a list."""
    smallest = items[0]
    for item in items:
        if item < smallest:
            smallest = item
    return smallest


def is_sorted(items: list[int]) -> bool:
    """Return True if the items are in ascending order."""
    return all(items[i] <= items[i + 1] for i in range(len(items) - 1))


def two_sum(items: list[int], target: int) -> tuple[int, int] | None:
    """Return the indices of two items that add up to target, or None."""
    seen: dict[int, int] = {}
    for index, item in enumerate(items):
        if target - item in seen:
            return seen[target - item], index
        seen[item] = index
    return None


def remove_duplicates(items: list[int]) -> list[int]:
    """Return the items without duplicates, in their first order."""
    seen = set()
    result = []
    for item in items:
        if item not in seen:
            seen.add(item)
            result.append(item)
    return result


def reverse_list(items: list[int]) -> list[int]:
    """Return the items in reverse order."""
    return items[::-1]


def rotate_list(items: list[int], count: int) -> list[int]:
    """Rotate a list to the left by count places."""
    if not items:
        return items
    count %= len(items)
    return items[count:] + items[:count]


def split_into_groups(items: list[int], size: int) -> list[list[int]]:
    """Split a list into groups of the given size."""
    return [items[start : start + size] for start in range(0, len(items), size)]
