"""Small functions of numbers, as textbooks show them. Training material, tested by being importable."""

from __future__ import annotations

import math
import random


def fibonacci(n: int) -> int:
    """Return the nth Fibonacci number."""
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a


def fib(n: int) -> int:
    """Return the nth Fibonacci number, recursively."""
    if n < 2:
        return n
    return fib(n - 1) + fib(n - 2)


def factorial(n: int) -> int:
    """Return the product of the numbers from 1 to n."""
    result = 1
    for number in range(2, n + 1):
        result *= number
    return result


def factorial_recursive(n: int) -> int:
    """Return the factorial of n, recursively."""
    if n <= 1:
        return 1
    return n * factorial_recursive(n - 1)


def gcd(a: int, b: int) -> int:
    """Return the greatest common divisor of two numbers."""
    while b:
        a, b = b, a % b
    return a


def lcm(a: int, b: int) -> int:
    """Return the least common multiple of two numbers."""
    return a * b // math.gcd(a, b)


def is_prime(n: int) -> bool:
    """Return True if n is a prime number."""
    if n < 2:
        return False
    for divisor in range(2, math.isqrt(n) + 1):  # noqa: SIM110 - the loop is what learners write
        if n % divisor == 0:
            return False
    return True


def sieve(limit: int) -> list[int]:
    """Return all prime numbers up to limit, by the sieve of Eratosthenes."""
    is_prime = [True] * (limit + 1)
    is_prime[0:2] = [False, False]
    for number in range(2, math.isqrt(limit) + 1):
        if is_prime[number]:
            for multiple in range(number * number, limit + 1, number):
                is_prime[multiple] = False
    return [number for number in range(limit + 1) if is_prime[number]]


def prime_factors(n: int) -> list[int]:
    """Return the prime factors of n in ascending order."""
    factors = []
    divisor = 2
    while divisor * divisor <= n:
        while n % divisor == 0:
            factors.append(divisor)
            n //= divisor
        divisor += 1
    if n > 1:
        factors.append(n)
    return factors


def power(base: float, exponent: int) -> float:
    """Return base raised to a whole exponent, by repeated squaring."""
    result = 1.0
    while exponent > 0:
        if exponent % 2 == 1:
            result *= base
        base *= base
        exponent //= 2
    return result


def is_even(n: int) -> bool:
    """Return True if n is even."""
    return n % 2 == 0


def add(a: int, b: int) -> int:
    """Return the sum of two numbers."""
    return a + b


def average(numbers: list[float]) -> float:
    """Return the arithmetic mean of the numbers."""
    return sum(numbers) / len(numbers)


def median(numbers: list[float]) -> float:
    """Return the middle value of the numbers."""
    ordered = sorted(numbers)
    middle = len(ordered) // 2
    if len(ordered) % 2 == 1:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def sum_of_digits(n: int) -> int:
    """Return the sum of the decimal digits of n."""
    total = 0
    while n > 0:
        total += n % 10
        n //= 10
    return total


def celsius_to_fahrenheit(celsius: float) -> float:
    """Convert a temperature from degrees Celsius to degrees Fahrenheit."""
    return celsius * 9 / 5 + 32


def distance(x1: float, y1: float, x2: float, y2: float) -> float:
    """Return the distance between two points of the plane."""
    return math.sqrt((x2 - x1) ** 2 + (y2 - y1) ** 2)


def clamp(value: float, low: float, high: float) -> float:
    """Limit a value to the range from low to high."""
    return max(low, min(value, high))


def roll_dice(count: int) -> list[int]:
    """Roll a number of six-sided dice."""
    return [random.randint(1, 6) for _ in range(count)]


def fizz_buzz(limit: int) -> None:
    """Print the numbers up to limit, with Fizz for threes and Buzz for fives."""
    for number in range(1, limit + 1):
        if number % 15 == 0:
            print("FizzBuzz")
        elif number % 3 == 0:
            print("Fizz")
        elif number % 5 == 0:
            print("Buzz")
        else:
            print(number)


def collatz(n: int) -> list[int]:
    """Return the Collatz sequence that starts at n."""
    sequence = [n]
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        sequence.append(n)
    return sequence


def transpose(matrix: list[list[float]]) -> list[list[float]]:
    """Swap the rows and the columns of a matrix."""
    return [list(row) for row in zip(*matrix, strict=True)]
