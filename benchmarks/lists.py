"""Lists in the arguments of a command: what stands between commas. Raise ValueError where something is no number."""


def names(text):
    return text.split(",")


def numbers(text):
    return [float(number) for number in text.split(",")]


def whole_numbers(text):
    return [int(number) for number in text.split(",")]
