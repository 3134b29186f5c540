//! The description of all routes in `openapi.json`, which is written by hand, and the fields that it lists for each route.

use serde_json::Value;
use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

/// The description.
pub(crate) const DOCUMENT: &str = include_str!("../openapi.json");

/// The fields of each path's JSON body.
static FIELDS: LazyLock<HashMap<String, HashSet<String>>> = LazyLock::new(|| {
    let document: Value = serde_json::from_str(DOCUMENT).unwrap_or_default();
    let paths = document["paths"].as_object().into_iter().flatten();
    let fields = paths.map(|(path, item)| {
        let body = resolve(&document, &item["post"]["requestBody"]);
        let mut names = HashSet::new();
        add_names(&document, &body["content"]["application/json"]["schema"], &mut names);
        (path.clone(), names)
    });
    fields.collect()
});

/// Whether the route at `path` reads the field `name` of its JSON body.
pub(crate) fn reads(path: &str, name: &str) -> bool {
    FIELDS.get(path).is_some_and(|names| names.contains(name))
}

/// Resolves references in the document.
pub(crate) fn resolve<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    let target = value["$ref"].as_str().and_then(|name| document.pointer(name.strip_prefix('#')?));
    target.map_or(value, |target| resolve(document, target))
}

fn add_names(document: &Value, schema: &Value, names: &mut HashSet<String>) {
    let schema = resolve(document, schema);
    names.extend(schema["properties"].as_object().into_iter().flat_map(|properties| properties.keys().cloned()));
    schema["allOf"].as_array().into_iter().flatten().for_each(|part| add_names(document, part, names));
}

#[cfg(test)]
mod tests {
    use super::reads;

    #[test]
    fn fields_are_those_of_the_path() {
        assert!(reads("/v1/chat/completions", "messages") && reads("/v1/chat/completions", "temperature"));
        assert!(!reads("/v1/chat/completions", "suffix") && reads("/completions", "suffix"));
        assert!(!reads("/none", "messages"));
    }
}
