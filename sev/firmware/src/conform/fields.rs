//! Reading fields of a vector's input.

use serde_json::Value;

/// Result of reading an input; the error says why it cannot be read.
pub(super) type Outcome<T> = Result<T, String>;

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut s, b| {
            let _ = write!(s, "{b:02x}");
            s
        })
}

pub(super) fn unhex(text: &str) -> Outcome<Vec<u8>> {
    let digits: Option<Vec<u8>> = text
        .chars()
        .map(|c| c.to_digit(16).map(|d| d as u8))
        .collect();
    match digits {
        Some(d) if d.len() % 2 == 0 => Ok(d.chunks(2).map(|p| p[0] << 4 | p[1]).collect()),
        _ => Err(format!("{text:?} is not an even number of hex digits")),
    }
}

pub(super) fn text<'a>(input: &'a Value, name: &str) -> Outcome<&'a str> {
    input[name]
        .as_str()
        .ok_or_else(|| format!("input {name} is not a string"))
}

/// An absent or null field is `None`.
pub(super) fn optional<'a>(input: &'a Value, name: &str) -> Option<&'a Value> {
    input.get(name).filter(|v| !v.is_null())
}

pub(super) fn bytes(input: &Value, name: &str) -> Outcome<Vec<u8>> {
    unhex(text(input, name)?).map_err(|e| format!("input {name}: {e}"))
}

pub(super) fn array<const N: usize>(input: &Value, name: &str) -> Outcome<[u8; N]> {
    let bytes = bytes(input, name)?;
    let length = bytes.len();
    bytes
        .try_into()
        .map_err(|_| format!("input {name} has {length} bytes instead of {N}"))
}

/// A number, either of JSON or a string in hex with `0x`.
pub(super) fn number(input: &Value, name: &str) -> Outcome<u64> {
    let value = &input[name];
    value
        .as_u64()
        .or_else(|| u64::from_str_radix(value.as_str()?.strip_prefix("0x")?, 16).ok())
        .ok_or_else(|| format!("input {name} is not a number: {value}"))
}

pub(super) fn number_or(input: &Value, name: &str, default: u64) -> Outcome<u64> {
    match optional(input, name) {
        Some(_) => number(input, name),
        None => Ok(default),
    }
}

/// A number that fits the field it is for.
pub(super) fn narrow<T: TryFrom<u64>>(input: &Value, name: &str) -> Outcome<T> {
    let value = number(input, name)?;
    T::try_from(value).map_err(|_| format!("input {name} is out of range: {value:#x}"))
}

pub(super) fn narrow_or<T: TryFrom<u64>>(input: &Value, name: &str, default: T) -> Outcome<T> {
    match optional(input, name) {
        Some(_) => narrow(input, name),
        None => Ok(default),
    }
}
