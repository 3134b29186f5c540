//! `/v1/files`: uploads, lists and deletes training files.

use crate::app::App;
use crate::auth::Client;
use crate::error::ApiError;
use crate::files::{FileRecord, FileStatus, Files, Upload};
use crate::routes::query::{Name, Query};
use crate::routes::table::Routes;
use axum::body::{Body, Bytes};
use axum::extract::multipart::{Field, Multipart, MultipartError};
use axum::extract::{FromRequest, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Extension, Json};
use futures_core::Stream;
use serde_json::{Value, json};
use std::io::Read;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// Longest pause during an upload, and longest upload.
const CHUNK_TIMEOUT: Duration = Duration::from_secs(30);
const UPLOAD_TIMEOUT: Duration = Duration::from_mins(15);
/// Maximum size in bytes of a part's header, and of a field other than the file.
const MAX_HEADER_BYTES: usize = 1 << 20;
const MAX_FIELD_BYTES: usize = 1 << 10;
const MAX_PARTS: usize = 16;
/// How long the response to an upload waits for the check of the file; after that it reports `uploaded`.
const CHECK_WAIT: Duration = Duration::from_secs(10);
/// The size of the blocks in which a file is sent.
const BLOCK_BYTES: usize = 64 << 10;
/// The allowed expiry times, in seconds.
const EXPIRY: std::ops::RangeInclusive<u64> = 3600..=2_592_000;

pub(crate) fn routes() -> Routes {
    Routes::default()
        .route("/v1/files", get(list).post(create))
        .route("/v1/files/{id}", get(one).delete(remove))
        .route("/v1/files/{id}/content", get(content))
}

/// The store, if the client may use it.
fn files<'a>(app: &'a App, client: &Client) -> Result<&'a Arc<Files>, ApiError> {
    client.check_admin()?;
    let message = "files are disabled: start the server with --jobs FOLDER";
    app.files.as_ref().ok_or_else(|| ApiError::not_found(message))
}

fn no_such_file(id: &str) -> ApiError {
    let id: String = id.chars().take(64).collect();
    ApiError::not_found(format!("there is no file `{id}`"))
}

/// `GET /v1/files`.
async fn list(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    query: Query,
) -> Result<Json<Value>, ApiError> {
    let mut records = files(&app, &client)?.list(&client.name);
    if let Some(purpose) = query.get("purpose") {
        records.retain(|record| record.object()["purpose"] == purpose);
    }
    if query.one_of("order", &["asc", "desc"])? != Some("asc") {
        records.reverse();
    }
    let limit = query.count("limit", 1, 10_000)?.unwrap_or(10_000);
    let start = match query.get("after") {
        None => 0,
        Some(after) => 1 + records.iter().position(|record| record.id == after).ok_or_else(|| no_such_file(after))?,
    };
    let page: Vec<&FileRecord> = records[start..].iter().take(limit).collect();
    let has_more = records.len() > start + page.len();
    let id = |record: Option<&&FileRecord>| record.map(|record| record.id.clone());
    let (first, last) = (id(page.first()), id(page.last()));
    let data: Vec<Value> = page.into_iter().map(FileRecord::object).collect();
    Ok(Json(json!({"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more})))
}

/// `GET /v1/files/ID`.
async fn one(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    Name(id): Name,
) -> Result<Json<Value>, ApiError> {
    let record = files(&app, &client)?.get(&client.name, &id).ok_or_else(|| no_such_file(&id))?;
    Ok(Json(record.object()))
}

/// `DELETE /v1/files/ID`. Jobs keep a copy of their files.
async fn remove(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    Name(id): Name,
) -> Result<Json<Value>, ApiError> {
    if !files(&app, &client)?.remove(&client.name, &id) {
        return Err(no_such_file(&id));
    }
    Ok(Json(json!({"id": id, "object": "file", "deleted": true})))
}

/// `GET /v1/files/ID/content`.
async fn content(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    Name(id): Name,
) -> Result<Response, ApiError> {
    let files = files(&app, &client)?;
    let record = files.get(&client.name, &id).ok_or_else(|| no_such_file(&id))?;
    let file = std::fs::File::open(files.path(&record.id)).map_err(ApiError::server)?;
    let mut response = Body::from_stream(Blocks(file)).into_response();
    let lines = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/jsonl")),
        // other sites must not be able to display the file as a page of this server
        (header::CONTENT_DISPOSITION, HeaderValue::from_static("attachment")),
    ];
    response.headers_mut().extend(lines);
    Ok(response)
}

/// Streams a file in blocks; each is read after the client has received the previous one.
struct Blocks(std::fs::File);

impl Stream for Blocks {
    type Item = std::io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut block = vec![0; BLOCK_BYTES];
        Poll::Ready(match self.0.read(&mut block) {
            Ok(0) => None,
            Ok(count) => {
                block.truncate(count);
                Some(Ok(block.into()))
            }
            Err(error) => Some(Err(error)),
        })
    }
}

/// `POST /v1/files`: a form with `file`, `purpose` and optionally `expires_after[seconds]`.
async fn create(
    State(app): State<Arc<App>>,
    Extension(client): Extension<Client>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let files = files(&app, &client)?;
    let late = |_| {
        let message = format!("the file did not arrive within {} s", UPLOAD_TIMEOUT.as_secs());
        ApiError::malformed(StatusCode::REQUEST_TIMEOUT, message)
    };
    let received = tokio::time::timeout(UPLOAD_TIMEOUT, receive(files, &client, request)).await.map_err(late)??;
    // the check of a small file is fast
    let (started, id) = (Instant::now(), received.id.clone());
    let mut record = received;
    while record.status == FileStatus::Uploaded && started.elapsed() < CHECK_WAIT {
        tokio::time::sleep(Duration::from_millis(10)).await;
        record = files.get(&client.name, &id).ok_or_else(|| no_such_file(&id))?;
    }
    Ok(Json(record.object()))
}

/// Reads the form. The file is streamed to disk.
async fn receive(files: &Arc<Files>, client: &Client, request: Request) -> Result<FileRecord, ApiError> {
    let waiting = Arc::new(AtomicUsize::new(0));
    let guarded = Arc::clone(&waiting);
    let request = request.map(|body| Body::from_stream(Guarded { body: body.into_data_stream(), waiting: guarded }));
    let mut form = Multipart::from_request(request, &()).await.map_err(|_| {
        let message = "expected the header `Content-Type: multipart/form-data` with a boundary";
        ApiError::malformed(StatusCode::UNSUPPORTED_MEDIA_TYPE, message)
    })?;
    let (mut upload, mut filename) = (None, String::new());
    let (mut purpose, mut anchor, mut seconds) = (None, None, None);
    let mut num_parts = 0;
    while let Some(mut field) = in_time(form.next_field()).await? {
        waiting.store(0, Ordering::Relaxed);
        num_parts += 1;
        if num_parts > MAX_PARTS {
            return Err(ApiError::invalid(format!("the form has more than {MAX_PARTS} parts")));
        }
        match field.name().unwrap_or_default() {
            "file" if upload.is_some() => return Err(ApiError::field("file", "`file` is given twice")),
            "file" => {
                filename = field.file_name().unwrap_or("file.jsonl").to_owned();
                upload = Some(store(files, &mut field, &waiting).await?);
            }
            "purpose" => purpose = Some(text(&mut field, "purpose").await?),
            "expires_after[anchor]" => anchor = Some(text(&mut field, "expires_after[anchor]").await?),
            "expires_after[seconds]" => seconds = Some(text(&mut field, "expires_after[seconds]").await?),
            // unknown fields are ignored
            _ => drop(text(&mut field, "form").await?),
        }
    }
    let upload = upload.ok_or_else(|| ApiError::field("file", "`file` is required"))?;
    match purpose.as_deref() {
        Some("fine-tune") => {}
        None => return Err(ApiError::field("purpose", "`purpose` is required")),
        Some(_) => return Err(ApiError::unsupported("purpose", "`purpose`: this server supports `fine-tune` only")),
    }
    if anchor.is_some_and(|anchor| anchor != "created_at") {
        return Err(ApiError::field("expires_after[anchor]", "`expires_after[anchor]`: expected `created_at`"));
    }
    let expires = seconds.map(|text| {
        text.parse().ok().filter(|seconds| EXPIRY.contains(seconds)).ok_or_else(|| {
            let message = format!(
                "`expires_after[seconds]`: expected a whole number from {} to {}",
                EXPIRY.start(),
                EXPIRY.end()
            );
            ApiError::field("expires_after[seconds]", message)
        })
    });
    let (expires, owner) = (expires.transpose()?, client.name.clone());
    let finish = move || upload.finish(&owner, &filename, "fine-tune", expires);
    tokio::task::spawn_blocking(finish).await.map_err(ApiError::server)?
}

/// Writes a part of the form to disk.
async fn store(files: &Arc<Files>, field: &mut Field<'_>, waiting: &AtomicUsize) -> Result<Upload, ApiError> {
    let mut upload = files.upload()?;
    while let Some(chunk) = in_time(field.chunk()).await? {
        waiting.store(0, Ordering::Relaxed);
        let write = move || upload.write(&chunk).map(|()| upload);
        upload = tokio::task::spawn_blocking(write).await.map_err(ApiError::server)??;
    }
    if upload.is_empty() {
        return Err(ApiError::field("file", "`file`: the file is empty"));
    }
    Ok(upload)
}

/// A short field of the form.
async fn text(field: &mut Field<'_>, name: &str) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(chunk) = in_time(field.chunk()).await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MAX_FIELD_BYTES {
            return Err(ApiError::field(name, format!("`{name}`: expected at most {MAX_FIELD_BYTES} bytes")));
        }
    }
    String::from_utf8(bytes).map_err(|_| ApiError::field(name, format!("`{name}`: expected UTF-8")))
}

async fn in_time<T>(read: impl Future<Output = Result<T, MultipartError>>) -> Result<T, ApiError> {
    let read = tokio::time::timeout(CHUNK_TIMEOUT, read).await.map_err(|_| {
        let message = format!("no part of the form arrived for {} s", CHUNK_TIMEOUT.as_secs());
        ApiError::malformed(StatusCode::REQUEST_TIMEOUT, message)
    })?;
    read.map_err(|_| ApiError::invalid("the form could not be read: expected multipart/form-data"))
}

/// Limits the bytes that are read from a body since `waiting` was last set to 0, because the parser has no limit for the
/// header of a part.
struct Guarded {
    body: axum::body::BodyDataStream,
    waiting: Arc<AtomicUsize>,
}

impl Stream for Guarded {
    type Item = Result<Bytes, axum::BoxError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let next = std::task::ready!(Pin::new(&mut self.body).poll_next(context));
        let count = next.as_ref().and_then(|chunk| chunk.as_ref().ok()).map_or(0, Bytes::len);
        if self.waiting.fetch_add(count, Ordering::Relaxed) + count > MAX_HEADER_BYTES {
            return Poll::Ready(Some(Err("the header of a part is too long".into())));
        }
        Poll::Ready(next.map(|chunk| chunk.map_err(Into::into)))
    }
}
