//! Checks and prepares JSON schemas before they are compiled.

use super::error::GrammarError;
use serde_json::{Map, Value, json};

/// The key of llguidance's options in a schema, which clients must not set.
const OPTIONS_KEY: &str = "x-guidance";
/// Schemas are compiled with 64-bit floats, which represent integers up to this exactly.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;
/// Maximum number of property patterns; all pairs are compared.
const MAX_PATTERNS: usize = 100;
/// Largest common multiple of all `multipleOf`: a grammar has one state per remainder.
const MAX_MULTIPLE: u64 = 10_000;

/// Prepares a schema for compiling. At most one space is allowed between JSON tokens, so that answers cannot be endless white
/// space.
pub(crate) fn prepared(schema: &Value, max_bytes: usize) -> Result<Value, GrammarError> {
    let invalid = |message: String| Err(GrammarError::Invalid(message));
    let bytes = schema.to_string().len();
    if bytes > max_bytes {
        return invalid(format!("the schema has {bytes} bytes, expected at most {max_bytes}"));
    }
    let mut map = match schema {
        Value::Object(map) => map.clone(),
        Value::Bool(true) => Map::new(),
        Value::Bool(false) => return invalid("no value satisfies the schema `false`".into()),
        other => {
            return invalid(format!("expected a JSON schema as an object, found {}", crate::fields::describe(other)));
        }
    };
    if let Some(number) = inexact_value(schema) {
        return invalid(format!("`const` and `enum` support integers up to 2^53, found {number}"));
    }
    let mut found = Costs::default();
    found.add(schema);
    found.check()?;
    // this replaces options sent by a client
    map.insert(OPTIONS_KEY.into(), json!({"whitespace_pattern": " "}));
    let mut prepared = Value::Object(map);
    let is_combined = ["allOf", "anyOf", "oneOf"].iter().any(|key| has_key(schema, key)) || extends_reference(schema);
    close_objects(&mut prepared, !is_combined);
    Ok(prepared)
}

/// Forbids additional properties in objects that list properties and do not set `additionalProperties`: small models add
/// properties endlessly. OpenAI's strict mode requires schemas to forbid them. Schemas that are combined with others are not
/// changed; `with_definitions` is whether definitions are.
fn close_objects(schema: &mut Value, with_definitions: bool) {
    const OPEN: [&str; 9] = [
        "minProperties",
        "additionalProperties",
        "patternProperties",
        "unevaluatedProperties",
        "allOf",
        "anyOf",
        "oneOf",
        "not",
        "$ref",
    ];
    let Value::Object(map) = schema else { return };
    let names = map.get("properties").and_then(Value::as_object);
    let required = map.get("required").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let has_all =
        required.iter().all(|name| names.zip(name.as_str()).is_some_and(|(all, name)| all.contains_key(name)));
    if names.is_some() && has_all && !OPEN.iter().any(|key| map.contains_key(*key)) {
        map.insert("additionalProperties".into(), false.into());
    }
    for (key, value) in map.iter_mut() {
        match (key.as_str(), value) {
            ("properties", Value::Object(inner)) => {
                inner.values_mut().for_each(|value| close_objects(value, with_definitions));
            }
            ("$defs" | "definitions", Value::Object(inner)) if with_definitions => {
                inner.values_mut().for_each(|value| close_objects(value, with_definitions));
            }
            ("items", value @ Value::Object(_)) => close_objects(value, with_definitions),
            ("prefixItems", Value::Array(items)) => {
                for value in items {
                    close_objects(value, with_definitions);
                }
            }
            _ => {}
        }
    }
}

/// Whether an object has properties in addition to a reference.
fn extends_reference(value: &Value) -> bool {
    match value {
        Value::Object(map) => {
            let extends =
                map.contains_key("$ref") && ["properties", "required"].iter().any(|key| map.contains_key(*key));
            extends || map.values().any(extends_reference)
        }
        Value::Array(items) => items.iter().any(extends_reference),
        _ => false,
    }
}

/// Whether an object in a value has a key.
fn has_key(value: &Value, key: &str) -> bool {
    match value {
        Value::Object(map) => map.contains_key(key) || map.values().any(|value| has_key(value, key)),
        Value::Array(items) => items.iter().any(|value| has_key(value, key)),
        _ => false,
    }
}

/// The keywords that need much time or memory to compile.
#[derive(Default)]
struct Costs<'a> {
    patterns: usize,
    multiples: Vec<&'a Value>,
}

impl<'a> Costs<'a> {
    fn add(&mut self, schema: &'a Value) {
        match schema {
            Value::Object(map) => {
                for (key, value) in map {
                    match (key.as_str(), value) {
                        ("patternProperties", Value::Object(patterns)) => self.patterns += patterns.len(),
                        ("multipleOf", Value::Number(_)) if !self.multiples.contains(&value) => {
                            self.multiples.push(value);
                        }
                        _ => {}
                    }
                    self.add(value);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| self.add(item)),
            _ => {}
        }
    }

    fn check(&self) -> Result<(), GrammarError> {
        if self.patterns > MAX_PATTERNS {
            let message = format!("`patternProperties`: expected at most {MAX_PATTERNS}, found {}", self.patterns);
            return Err(GrammarError::Invalid(message));
        }
        let whole = self.multiples.iter().try_fold(1u64, |whole, multiple| {
            let part = coefficient(multiple)?;
            // all of them may apply to one number
            Some(whole / gcd(whole, part) * part).filter(|whole| *whole <= MAX_MULTIPLE)
        });
        if whole.is_none() {
            let found: Vec<String> = self.multiples.iter().take(3).map(ToString::to_string).collect();
            let message = format!("`multipleOf` is supported up to {MAX_MULTIPLE}, found {}", found.join(" and "));
            return Err(GrammarError::Invalid(message));
        }
        Ok(())
    }
}

/// The digits of a positive number as an integer.
fn coefficient(number: &Value) -> Option<u64> {
    let text = number.to_string();
    let text = text.strip_suffix(".0").unwrap_or(&text);
    text.replace('.', "").parse().ok().filter(|&number| number > 0)
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A number in a `const` or `enum` that a float cannot represent.
fn inexact_value(schema: &Value) -> Option<&Value> {
    match schema {
        Value::Object(map) => map.iter().find_map(|(key, value)| match key.as_str() {
            "const" | "enum" => inexact_number(value).or_else(|| inexact_value(value)),
            _ => inexact_value(value),
        }),
        Value::Array(items) => items.iter().find_map(inexact_value),
        _ => None,
    }
}

fn inexact_number(value: &Value) -> Option<&Value> {
    match value {
        Value::Number(number) => {
            let is_integer = number.is_i64() || number.is_u64();
            number.as_f64().is_some_and(|number| is_integer && number.abs() >= MAX_EXACT).then_some(value)
        }
        Value::Array(items) => items.iter().find_map(inexact_number),
        Value::Object(map) => map.values().find_map(inexact_number),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn objects_with_properties_forbid_others() {
        let closed = |schema: Value| prepared(&schema, 10_000).unwrap();
        let nested =
            json!({"properties": {"properties": {"properties": {"a": {}}}}, "$defs": {"d": {"properties": {}}}});
        let found = closed(nested.clone());
        assert_eq!(found["additionalProperties"], false);
        assert_eq!(found["properties"]["properties"]["additionalProperties"], false);
        assert!(found["properties"].get("additionalProperties").is_none());
        assert_eq!(found["$defs"]["d"]["additionalProperties"], false);
        assert_eq!(closed(json!({"properties": {}, "additionalProperties": true}))["additionalProperties"], true);
        let combined = closed(json!({"allOf": [{"$ref": "#/$defs/d"}], "$defs": nested["$defs"]}));
        assert!(combined["$defs"]["d"].get("additionalProperties").is_none());
        assert!(combined.get("additionalProperties").is_none());
        for open in [
            json!({"properties": {"a": {}}, "required": ["a", "b"]}),
            json!({"properties": {"a": {}}, "minProperties": 2}),
        ] {
            assert!(closed(open).get("additionalProperties").is_none());
        }
        let extended = json!({"$ref": "#/$defs/d", "properties": {"x": {}}, "$defs": nested["$defs"]});
        assert!(closed(extended)["$defs"]["d"].get("additionalProperties").is_none());
    }
}
