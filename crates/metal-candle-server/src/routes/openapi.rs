//! `GET /openapi.json`: serves the description of all routes, which is written by hand.

use crate::document::DOCUMENT;
use axum::http::header;
use axum::response::IntoResponse;

/// The document.
pub(crate) async fn document() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use crate::config::{JobsConfig, ServerConfig};
    use crate::document::{DOCUMENT, resolve};
    use crate::fields::asked;
    use crate::server::Server;
    use axum::Router;
    use axum::body::{Body, to_bytes};
    use axum::http::{Request, StatusCode, header};
    use metal_candle::Device;
    use metal_candle::data::Tokenizer;
    use metal_candle::models::ModelLoader;
    use serde_json::{Map, Value, json};
    use std::collections::BTreeSet;
    use tower::ServiceExt as _;

    fn document() -> Value {
        serde_json::from_str(DOCUMENT).unwrap()
    }

    /// A server with all routes enabled, and the folder of its jobs.
    fn server() -> (Router, tempfile::TempDir) {
        let nano = concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/nano");
        let model = ModelLoader::new().with_device(Device::CPU).load(nano).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let jobs = JobsConfig {
            folder: folder.path().to_owned(),
            program: "false".into(),
            model_flags: Vec::new(),
            learning_rate: 1e-4,
            max_file_bytes: 1 << 20,
            max_total_bytes: 1 << 20,
        };
        let config =
            ServerConfig { slots: 2, context: 256, metrics: true, jobs: Some(jobs), ..ServerConfig::default() };
        let server = Server::new(&model, Tokenizer::from_folder(nano).unwrap(), config).unwrap();
        (server.router(), folder)
    }

    /// The status, allowed methods and body of a response.
    async fn send(router: &Router, method: &str, path: &str, body: String) -> (StatusCode, String, Value) {
        let request = Request::builder().method(method).uri(path).header(header::CONTENT_TYPE, "application/json");
        let response = router.clone().oneshot(request.body(Body::from(body)).unwrap()).await.unwrap();
        let allow = response.headers().get(header::ALLOW).map_or("", |value| value.to_str().unwrap()).to_owned();
        let status = response.status();
        let bytes = to_bytes(response.into_body(), usize::MAX).await.unwrap();
        (status, allow, serde_json::from_slice(&bytes).unwrap_or_default())
    }

    #[tokio::test]
    async fn every_route_is_documented_and_the_reverse() {
        let (router, _folder) = server();
        let mut found = BTreeSet::new();
        for path in crate::routes::api().paths {
            // no route has this method, so the response lists the allowed methods
            let (status, allow, _) = send(&router, "TRACE", &path.replace(['{', '}', '*'], "x"), String::new()).await;
            assert_eq!(status, StatusCode::METHOD_NOT_ALLOWED, "{path}");
            for method in allow.split(',').map(|method| method.trim().to_lowercase()).filter(|method| method != "head")
            {
                found.insert((path.replace('*', ""), method));
            }
        }
        let mut expected = BTreeSet::new();
        for (path, item) in document()["paths"].as_object().unwrap() {
            for method in item.as_object().unwrap().keys() {
                expected.insert((path.clone(), method.clone()));
            }
        }
        assert_eq!(found, expected);
    }

    fn each<'a>(value: &'a Value, visit: &mut impl FnMut(&'a Map<String, Value>)) {
        match value {
            Value::Object(map) => {
                visit(map);
                map.values().for_each(|value| each(value, visit));
            }
            Value::Array(list) => list.iter().for_each(|value| each(value, visit)),
            _ => {}
        }
    }

    #[test]
    fn references_are_resolved_and_all_components_are_used() {
        let document = document();
        assert_eq!(document["openapi"], "3.1.0");
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
        let (mut used, mut ids) = (BTreeSet::new(), BTreeSet::new());
        each(&document, &mut |map| {
            if let Some(Value::String(name)) = map.get("$ref") {
                let target = document.pointer(name.trim_start_matches('#'));
                target.unwrap_or_else(|| panic!("`{name}` is not in the document"));
                used.insert(name.clone());
            }
            if let Some(Value::String(id)) = map.get("operationId") {
                assert!(ids.insert(id.clone()), "{id}");
            }
        });
        for kind in ["headers", "requestBodies", "responses", "schemas"] {
            for name in document["components"][kind].as_object().unwrap().keys() {
                let reference = format!("#/components/{kind}/{name}");
                assert!(used.contains(&reference), "nothing refers to {reference}");
            }
        }
    }

    #[test]
    fn schemas_are_schemas() {
        for (name, schema) in document()["components"]["schemas"].as_object().unwrap() {
            assert!(jsonschema::draft202012::meta::is_valid(schema), "{name}");
        }
    }

    /// The names of the fields of a request, including refused fields.
    fn names(document: &Value, schema: &Value) -> BTreeSet<String> {
        let schema = resolve(document, schema);
        let mut found: BTreeSet<String> =
            schema["properties"].as_object().into_iter().flat_map(Map::keys).cloned().collect();
        for refused in schema["x-refused"].as_array().into_iter().flatten() {
            found.insert(refused.as_str().unwrap().to_owned());
            assert!(schema["description"].as_str().unwrap().contains(&format!("`{}`", refused.as_str().unwrap())));
        }
        schema["allOf"].as_array().into_iter().flatten().for_each(|part| found.extend(names(document, part)));
        found
    }

    /// A request whose fields are all read.
    fn request(schema: &str) -> Value {
        let messages = json!([{"role": "user", "content": "a"}]);
        match schema {
            "ChatRequest" | "MessagesRequest" => json!({"messages": messages, "max_tokens": 1}),
            "TemplateRequest" | "MessagesFields" => json!({"messages": messages}),
            "CompletionRequest" | "NativeRequest" | "InfillRequest" => json!({"max_tokens": 1}),
            "ResponsesRequest" | "ResponsesFields" => json!({"input": "a", "max_output_tokens": 16}),
            "TokenizeRequest" => json!({"content": "a"}),
            "DetokenizeRequest" => json!({"tokens": [1]}),
            "EmbeddingsRequest" => json!({"input": "a"}),
            "LoadAdapterRequest" => json!({"name": "a", "path": "a"}),
            "LoadLoraRequest" => json!({"lora_name": "a", "lora_path": "a"}),
            "UnloadLoraRequest" => json!({"lora_name": "a"}),
            "JobRequest" => json!({"model": "default", "training_file": "a"}),
            other => panic!("there is no request for `{other}`"),
        }
    }

    #[tokio::test]
    async fn fields_that_are_read_are_those_of_the_document() {
        let (router, _folder) = server();
        let document = document();
        for (path, item) in document["paths"].as_object().unwrap() {
            let schema = &resolve(&document, &item["post"]["requestBody"])["content"]["application/json"]["schema"];
            let Some(reference) = schema["$ref"].as_str() else { continue };
            let body = request(reference.rsplit('/').next().unwrap());
            asked::start();
            let (status, _, answer) = send(&router, "POST", path, body.to_string()).await;
            // the server has no adapters and no files
            let is_read = status.is_success() || path.contains("adapter") || path.contains("jobs");
            assert!(is_read, "{path}: {status} {answer}");
            let mut found = asked::names();
            // `best_of` is compared with `n`; formats and tools are converted to fields of the chat route
            for name in ["n", "response_format", "parallel_tool_calls"] {
                if !names(&document, schema).contains(name) {
                    found.remove(name);
                }
            }
            assert_eq!(found, names(&document, schema), "{path}");
        }
    }

    #[tokio::test]
    async fn errors_have_the_shape_of_their_path() {
        let (router, _folder) = server();
        let shape = async |method: &str, path: &str| send(&router, method, path, String::new()).await.2;
        for (method, path) in [("GET", "/v1/files/%ff"), ("GET", "/v1/models/%ff"), ("DELETE", "/v1/adapters/%ff")] {
            assert_eq!(shape(method, path).await["error"]["code"], Value::Null, "{path}");
            assert_eq!(shape(method, path).await["error"]["type"], "invalid_request_error", "{path}");
        }
        for (method, path) in [("GET", "/v1/messages"), ("POST", "/v1/messages/batches")] {
            assert_eq!(shape(method, path).await["type"], "error", "{path}");
        }
        assert_eq!(shape("GET", "/v1/completions").await["error"]["type"], "invalid_request_error");
        assert_eq!(shape("GET", "/openapi.json").await, document());
    }
}
