//! Strict reading of a transcript's objects: every key must be known, numbers may be decimal or hex strings.

use serde_json::{Map, Value};

pub(super) type Parsed<T> = Result<T, String>;

/// An object whose keys are taken one by one; what is left at the end is an error.
pub(super) struct Object(Map<String, Value>);

impl Object {
    pub(super) fn parse(line: &[u8]) -> Parsed<Self> {
        match serde_json::from_slice(line) {
            Ok(Value::Object(map)) => Ok(Object(map)),
            Ok(_) => Err("the line is not an object".into()),
            Err(e) => Err(e.to_string()),
        }
    }

    pub(super) fn from_value(v: Value) -> Parsed<Self> {
        match v {
            Value::Object(map) => Ok(Object(map)),
            other => Err(format!("{other} is not an object")),
        }
    }

    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        self.0.remove(key)
    }

    pub(super) fn need(&mut self, key: &str) -> Parsed<Value> {
        self.take(key)
            .ok_or_else(|| format!("key {key} is missing"))
    }

    pub(super) fn number(&mut self, key: &str) -> Parsed<u64> {
        number(&self.need(key)?)
    }

    pub(super) fn number_or(&mut self, key: &str, default: u64) -> Parsed<u64> {
        self.take(key).map_or(Ok(default), |v| number(&v))
    }

    pub(super) fn string(&mut self, key: &str) -> Parsed<String> {
        match self.need(key)? {
            Value::String(s) => Ok(s),
            other => Err(format!("{key} is {other}, not a string")),
        }
    }

    pub(super) fn array(&mut self, key: &str) -> Parsed<Vec<Value>> {
        array(self.need(key)?)
    }

    /// Ends the reading of the object.
    pub(super) fn done(self) -> Parsed<()> {
        match self.0.keys().next() {
            None => Ok(()),
            Some(key) => Err(format!("unknown key {key}")),
        }
    }

    pub(super) fn into_entries(self) -> impl Iterator<Item = (String, Value)> {
        self.0.into_iter()
    }
}

pub(super) fn array(v: Value) -> Parsed<Vec<Value>> {
    match v {
        Value::Array(a) => Ok(a),
        other => Err(format!("{other} is not an array")),
    }
}

/// A number in any of its spellings; a negative one as its two's complement.
pub(super) fn number(v: &Value) -> Parsed<u64> {
    let parsed = match v {
        Value::Number(n) => n.as_u64().or_else(|| n.as_i64().map(|i| i as u64)),
        Value::String(s) => match s.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => s.parse().ok(),
        },
        Value::Bool(b) => Some(u64::from(*b)),
        _ => None,
    };
    parsed.ok_or_else(|| format!("{v} is not a number"))
}

pub(super) fn numbers(values: Vec<Value>) -> Parsed<Vec<u64>> {
    values.iter().map(number).collect()
}

/// A number that must fit a smaller type.
pub(super) fn narrow<T: TryFrom<u64>>(n: u64) -> Parsed<T> {
    T::try_from(n).map_err(|_| format!("{n:#x} is out of range"))
}
