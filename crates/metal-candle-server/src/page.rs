//! Serves the web UI: three built files that are embedded in the program.
//!
//! The sources are in `web/`; `npm run build` there writes `web/dist/`. A test fails if the sources have changed since.

use axum::Router;
use axum::body::{Body, Bytes};
use axum::http::header::{self, HeaderMap, HeaderValue};
use axum::http::{HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use sha2::{Digest, Sha256};
use std::fmt::Write as _;

/// Allows scripts, styles and connections of this server only, no inline code, and no framing.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// A file of the web UI.
struct File {
    path: &'static str,
    content_type: &'static str,
    bytes: &'static [u8],
}

/// All files of the web UI. No other path is served, and nothing is read from disk.
const FILES: [File; 3] = [
    File { path: "/", content_type: "text/html; charset=utf-8", bytes: include_bytes!("../web/dist/index.html") },
    File {
        path: "/app.js",
        content_type: "text/javascript; charset=utf-8",
        bytes: include_bytes!("../web/dist/app.js"),
    },
    File { path: "/app.css", content_type: "text/css; charset=utf-8", bytes: include_bytes!("../web/dist/app.css") },
];

/// The routes of the web UI. They require no key; the web UI prompts for one if the API requires it.
pub(crate) fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.iter().fold(Router::new(), |router, file| {
        let etag = etag(file.bytes);
        let answer = move |headers: HeaderMap| std::future::ready(answer(file, &etag, &headers));
        router.route(file.path, get(answer))
    })
}

/// Whether a path is a file of the web UI.
pub(crate) fn is_page(path: &str) -> bool {
    FILES.iter().any(|file| file.path == path)
}

/// The file, or 304 if the browser has it. Browsers revalidate each time, so they load the web UI of a new version.
fn answer(file: &'static File, etag: &str, headers: &HeaderMap) -> Response {
    let known = headers.get_all(header::IF_NONE_MATCH).iter().filter_map(|value| value.to_str().ok());
    let is_known = known
        .flat_map(|tags| tags.split(','))
        .map(str::trim)
        .any(|tag| tag == "*" || tag.strip_prefix("W/").unwrap_or(tag) == etag);
    let (status, body) = if is_known {
        (StatusCode::NOT_MODIFIED, Body::empty())
    } else {
        (StatusCode::OK, Body::from(Bytes::from_static(file.bytes)))
    };
    let fixed: [(HeaderName, &str); 7] = [
        (header::CONTENT_TYPE, file.content_type),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (header::ETAG, etag),
    ];
    let mut response = (status, body).into_response();
    for (name, value) in fixed {
        // All values are visible ASCII.
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// An etag of the contents.
fn etag(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    format!("\"{}\"", hex(&digest[..16]))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use axum::body::to_bytes;
    use axum::http::Request;
    use serde_json::Value;
    use std::path::{Path, PathBuf};
    use tower::ServiceExt as _;

    /// The inputs of the build besides `src/`.
    const SOURCES: [&str; 6] =
        ["index.html", "package-lock.json", "package.json", "tools/digest.mjs", "tsconfig.json", "vite.config.js"];

    fn web() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("web")
    }

    fn walk(root: &Path, folder: &str, found: &mut Vec<String>) {
        for entry in std::fs::read_dir(root.join(folder)).unwrap() {
            let entry = entry.unwrap();
            let path = format!("{folder}/{}", entry.file_name().to_str().unwrap());
            if entry.file_type().unwrap().is_dir() {
                walk(root, &path, found);
            } else {
                found.push(path);
            }
        }
    }

    /// The digest that `web/tools/digest.mjs` writes, independent of line endings.
    fn digest_of_sources() -> String {
        let root = web();
        let mut paths: Vec<String> = SOURCES.iter().map(ToString::to_string).collect();
        walk(&root, "src", &mut paths);
        paths.sort();
        let mut digest = Sha256::new();
        for path in paths {
            let text = std::fs::read_to_string(root.join(&path)).unwrap().replace("\r\n", "\n");
            digest.update(format!("{path}\0{}\0", text.len()));
            digest.update(text);
        }
        hex(&digest.finalize())
    }

    fn build() -> Value {
        serde_json::from_slice(&std::fs::read(web().join("dist/build.json")).unwrap()).unwrap()
    }

    #[test]
    fn built_files_match_the_sources() {
        let build = build();
        let message = "web/src has changed: run `npm ci && npm run build` in crates/metal-candle-server/web";
        assert_eq!(build["sources"], digest_of_sources(), "{message}");
        for file in FILES {
            let name = if file.path == "/" { "index.html" } else { &file.path[1..] };
            assert_eq!(build["files"][name], hex(&Sha256::digest(file.bytes)), "{name} was edited: {message}");
        }
        assert_eq!(build["files"].as_object().unwrap().len(), FILES.len());
    }

    #[test]
    fn the_web_ui_has_no_inline_code_and_no_other_hosts() {
        let html = str::from_utf8(FILES[0].bytes).unwrap();
        for forbidden in ["<style", "style=", "onload=", "onclick=", "src=\"http", "href=\"http", "src=\"//"] {
            assert!(!html.contains(forbidden), "{forbidden}");
        }
        let scripts = html.matches("<script").count();
        assert_eq!((scripts, html.matches("src=\"./app.js\"></script>").count()), (1, 1));
        let css = str::from_utf8(FILES[2].bytes).unwrap();
        assert!(!css.contains("url(") && !css.contains("@import"));
        let lock = std::fs::read_to_string(web().join("package-lock.json")).unwrap();
        for forbidden in ["http:", "https:", "resolved", "file:"] {
            assert!(!lock.contains(forbidden), "package-lock.json contains `{forbidden}`: run `npm run lock`");
        }
    }

    async fn ask(request: axum::http::request::Builder) -> Response {
        router::<()>().oneshot(request.body(Body::empty()).unwrap()).await.unwrap()
    }

    #[tokio::test]
    async fn files_are_served_with_strict_headers_and_revalidated() {
        for file in &FILES {
            let response = ask(Request::get(file.path)).await;
            assert_eq!(response.status(), StatusCode::OK);
            let headers = response.headers().clone();
            assert_eq!(headers[header::CONTENT_TYPE], file.content_type);
            assert_eq!(headers[header::CONTENT_SECURITY_POLICY], POLICY);
            assert_eq!(headers[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
            assert_eq!(headers[header::REFERRER_POLICY], "no-referrer");
            assert_eq!(headers[header::CACHE_CONTROL], "no-cache");
            assert_eq!(to_bytes(response.into_body(), usize::MAX).await.unwrap(), file.bytes);

            let etag = headers[header::ETAG].to_str().unwrap();
            for tags in [etag.to_owned(), format!("\"other\", W/{etag}"), "*".to_owned()] {
                let response = ask(Request::get(file.path).header(header::IF_NONE_MATCH, tags)).await;
                assert_eq!(response.status(), StatusCode::NOT_MODIFIED);
                assert_eq!(response.headers()[header::CONTENT_SECURITY_POLICY], POLICY);
                assert!(to_bytes(response.into_body(), 1).await.unwrap().is_empty());
            }
            let response = ask(Request::get(file.path).header(header::IF_NONE_MATCH, "\"other\"")).await;
            assert_eq!(response.status(), StatusCode::OK);
            let response = ask(Request::head(file.path)).await;
            assert_eq!(response.headers()[header::CONTENT_LENGTH], file.bytes.len().to_string());
        }
    }

    #[tokio::test]
    async fn no_other_path_is_served() {
        for path in ["/index.html", "/build.json", "/app.js/", "//app.js", "/../Cargo.toml", "/%2e%2e/app.js", "/src"] {
            assert_eq!(ask(Request::get(path)).await.status(), StatusCode::NOT_FOUND, "{path}");
            assert!(!is_page(path));
        }
        assert_eq!(ask(Request::post("/")).await.status(), StatusCode::METHOD_NOT_ALLOWED);
        assert!(is_page("/") && is_page("/app.css"));
    }
}
