//! Downloads one file from the Hub into the cache.

use super::name::HubName;
use crate::error::{Error, Result};
use crate::files::{create_folder, open_to_append};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The number of times an interrupted transfer is resumed.
const MAX_RETRIES: u32 = 5;
const MAX_REDIRECTS: usize = 8;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time without data from the server.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

type Outcome<T> = std::result::Result<T, Failure>;

/// The progress of the download of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DownloadProgress<'a> {
    /// The file's name.
    pub file: &'a str,
    /// Bytes on disk, including bytes of an earlier, interrupted download.
    pub num_bytes: u64,
    /// Bytes of the whole file, if the server reports them.
    pub total_bytes: Option<u64>,
}

/// Why a download failed.
pub(super) enum Failure {
    /// The Hub did not answer; the cache may be used instead.
    Unreachable(String),
    /// The transfer was interrupted; a new request may resume it.
    BrokeOff(String),
    /// Retrying does not help.
    Final(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// Downloads files of one model.
pub(super) struct Transfer<'a> {
    endpoint: &'a str,
    token: Option<&'a str>,
    name: &'a HubName,
    /// The model's folder in the cache.
    folder: PathBuf,
    agent: ureq::Agent,
}

/// A file in the cache.
pub(super) struct Fetched {
    pub(super) blob: PathBuf,
    /// Its commit, if the server reports it.
    pub(super) commit: Option<String>,
}

/// The headers of all responses up to the file.
#[derive(Default)]
struct Headers {
    commit: Option<String>,
    etag: Option<String>,
    size: Option<u64>,
}

/// The response with the bytes of a file.
struct Answer {
    response: ureq::Response,
    headers: Headers,
    /// The address of the file after all redirections.
    url: String,
    /// The first requested byte.
    start: u64,
}

impl<'a> Transfer<'a> {
    pub(super) fn new(endpoint: &'a str, token: Option<&'a str>, name: &'a HubName, folder: PathBuf) -> Self {
        let agent = ureq::AgentBuilder::new()
            .redirects(0)
            .timeout_connect(CONNECT_TIMEOUT)
            .timeout_read(READ_TIMEOUT)
            .try_proxy_from_env(true)
            .user_agent(concat!("metal-candle/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { endpoint, token, name, folder, agent }
    }

    /// Downloads `file` of `revision` into the cache; `None` if the model has no such file.
    pub(super) fn fetch(
        &self,
        revision: &str,
        file: &str,
        on_progress: &mut dyn FnMut(DownloadProgress),
    ) -> Outcome<Option<Fetched>> {
        let revision = revision.replace('/', "%2F");
        let url = format!("{}/{}/resolve/{revision}/{file}", self.endpoint, self.name.repository());
        let mut retries = 0;
        loop {
            match self.attempt(&url, file, on_progress) {
                // do not retry if there was never a connection
                Err(Failure::Unreachable(message)) if retries == 0 => return Err(Failure::Unreachable(message)),
                Err(Failure::Unreachable(message) | Failure::BrokeOff(message)) => {
                    if retries == MAX_RETRIES {
                        return Err(Failure::Unreachable(message));
                    }
                    std::thread::sleep(Duration::from_millis(200 << retries));
                    retries += 1;
                }
                outcome => return outcome,
            }
        }
    }

    fn attempt(
        &self,
        url: &str,
        file: &str,
        on_progress: &mut dyn FnMut(DownloadProgress),
    ) -> Outcome<Option<Fetched>> {
        let Some(answer) = self.request(url, file)? else { return Ok(None) };
        let etag = answer.headers.etag.clone();
        let blob_name = etag
            .clone()
            .unwrap_or_else(|| format!("{}-{file}", answer.headers.commit.as_deref().unwrap_or("unversioned")));
        let blob = self.folder.join("blobs").join(&blob_name);
        let fetched = Fetched { blob: blob.clone(), commit: answer.headers.commit.clone() };
        if blob.exists() && etag.is_some() {
            return Ok(Some(fetched));
        }

        // if two processes need the same file, the second one waits and then finds it
        let lock_path = self.lock_path(&blob_name);
        create_parent(&lock_path)?;
        let lock = open_to_append(&lock_path)?;
        lock.lock().map_err(|e| Error::write(&lock_path, e))?;
        if blob.exists() && etag.is_some() {
            return Ok(Some(fetched));
        }
        let partial = self.partial_path(&blob_name);
        create_parent(&partial)?;
        if etag.is_none() && partial.exists() {
            // without an etag, the partial file may be of another version
            std::fs::remove_file(&partial).map_err(|e| Error::write(&partial, e))?;
        }
        self.receive(answer, file, &partial, on_progress)?;
        std::fs::rename(&partial, &blob).map_err(|e| Error::write(&blob, e))?;
        Ok(Some(fetched))
    }

    fn lock_path(&self, blob_name: &str) -> PathBuf {
        let model = self.folder.file_name().unwrap_or_default();
        let cache = self.folder.parent().unwrap_or(Path::new("."));
        cache.join(".locks").join(model).join(format!("{blob_name}.lock"))
    }

    fn partial_path(&self, blob_name: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{blob_name}.incomplete"))
    }

    /// Follows redirections to the bytes of a file.
    fn request(&self, url: &str, file: &str) -> Outcome<Option<Answer>> {
        let mut headers = Headers::default();
        let mut url = url.to_owned();
        for _ in 0..MAX_REDIRECTS {
            // once the etag is known, request only the missing bytes
            let partial = headers.etag.as_ref().and_then(|etag| std::fs::metadata(self.partial_path(etag)).ok());
            let start = partial.map_or(0, |partial| partial.len());
            let response = match self.get(&url, start)? {
                (416, response) if start > 0 => return Ok(Some(Answer { response, headers, url, start })),
                (404, response) => {
                    return match response.header("x-error-code") {
                        Some("RepoNotFound" | "RevisionNotFound") => Err(self.no_such_model(&response).into()),
                        // without an error code in the response: `config.json` is requested first, so the model is missing
                        None if file == "config.json" => Err(self.no_such_model(&response).into()),
                        _ => Ok(None),
                    };
                }
                (200..=399, response) => response,
                (status, response) => return Err(self.refused(status, &response, file)),
            };
            let header = |name| response.header(name).map(ToOwned::to_owned);
            headers.commit = headers.commit.or_else(|| Some(plain_name(&header("x-repo-commit")?)));
            headers.etag = headers.etag.or_else(|| etag_name(&header("x-linked-etag")?));
            headers.size = headers.size.or_else(|| header("x-linked-size")?.parse().ok());
            if response.status() < 300 {
                headers.etag = headers.etag.or_else(|| etag_name(&header("etag")?));
                if response.status() == 200 {
                    headers.size = headers.size.or_else(|| header("content-length")?.parse().ok());
                }
                return Ok(Some(Answer { response, headers, url, start }));
            }
            let Some(location) = response.header("location") else {
                return Err(
                    Error::Hub(format!("`{url}` redirects without an address (status {})", response.status())).into()
                );
            };
            url = join(&url, location)?;
        }
        Err(Error::Hub(format!("`{file}` of `{}`: more than {MAX_REDIRECTS} redirections", self.name)).into())
    }

    /// Sends one request, for the bytes from `start` on.
    fn get(&self, url: &str, start: u64) -> Outcome<(u16, ureq::Response)> {
        let mut request = self.agent.get(url);
        if let Some(token) = self.token.filter(|_| same_host(url, self.endpoint)) {
            request = request.set("authorization", &format!("Bearer {token}"));
        }
        if start > 0 {
            request = request.set("range", &format!("bytes={start}-"));
        }
        match request.call() {
            Ok(response) => Ok((response.status(), response)),
            Err(ureq::Error::Status(status, response)) => Ok((status, response)),
            Err(ureq::Error::Transport(transport)) => {
                let reason = transport.to_string();
                let reason = reason.strip_prefix(url).map_or(reason.as_str(), |rest| rest.trim_start_matches(": "));
                Err(Failure::Unreachable(format!("`{}` cannot be reached: {reason}", host(url))))
            }
        }
    }

    /// Writes the missing bytes of `answer` to `partial`.
    fn receive(
        &self,
        answer: Answer,
        file: &str,
        partial: &Path,
        on_progress: &mut dyn FnMut(DownloadProgress),
    ) -> Outcome<()> {
        let open = || open_to_append(partial);
        let mut out = open()?;
        let mut written = out.metadata().map_err(|e| Error::read(partial, e))?.len();
        let Answer { mut response, headers, url, start } = answer;
        let mut total = headers.size;
        if written > 0 && Some(written) == total {
            return Ok(());
        }
        if start != written {
            // another process has extended the file, or its etag was unknown at the time of the request
            response = self.get(&url, written)?.1;
        }
        let goes_on =
            response.status() == 206 && response.header("content-range").and_then(range_start) == Some(written);
        if written > 0 && !goes_on {
            // the server does not support ranges, or the partial file is longer than the file: start again
            if response.status() != 200 {
                response = self.get(&url, 0)?.1;
            }
            out.set_len(0).map_err(|e| Error::write(partial, e))?;
            written = 0;
        }
        if response.status() >= 300 {
            return Err(self.refused(response.status(), &response, file));
        }
        let rest = response.header("content-length").and_then(|length| length.parse::<u64>().ok());
        total = total.or(rest.map(|rest| written + rest));
        let mut reader = response.into_reader();
        let mut buffer = vec![0; 256 << 10];
        on_progress(DownloadProgress { file, num_bytes: written, total_bytes: total });
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    out.write_all(&buffer[..count]).map_err(|e| Error::write(partial, e))?;
                    written += count as u64;
                    on_progress(DownloadProgress { file, num_bytes: written, total_bytes: total });
                }
                Err(error) => {
                    return Err(Failure::BrokeOff(format!("the download of `{file}` was interrupted: {error}")));
                }
            }
        }
        match total {
            Some(total) if written < total => Err(Failure::BrokeOff(format!(
                "the download of `{file}` was interrupted after {written} of {total} bytes"
            ))),
            Some(total) if written > total => {
                std::fs::remove_file(partial).map_err(|e| Error::write(partial, e))?;
                Err(Error::Hub(format!("`{file}` of `{}`: expected {total} bytes, received {written}", self.name))
                    .into())
            }
            _ => Ok(out.sync_all().map_err(|e| Error::write(partial, e))?),
        }
    }

    fn no_such_model(&self, response: &ureq::Response) -> Error {
        if response.header("x-error-code") == Some("RevisionNotFound") {
            return Error::Hub(format!("`{}` has no revision `{}`", self.name.repository(), self.name.revision()));
        }
        Error::Hub(format!("there is no model `{}` at `{}` (status 404)", self.name, host(self.endpoint)))
    }

    fn refused(&self, status: u16, response: &ureq::Response, file: &str) -> Failure {
        let name = self.name.repository();
        let gated = response.header("x-error-code") == Some("GatedRepo");
        let message = match (status, self.token) {
            (401 | 403, _) if gated => {
                format!(
                    "`{name}` is gated: accept its terms at `{}/{name}` and set `HF_TOKEN` (status {status})",
                    self.endpoint
                )
            }
            (401, None) => {
                format!("`{name}` does not exist or is private; for a private model set `HF_TOKEN` (status 401)")
            }
            (401 | 403, Some(_)) => {
                format!("`{name}` does not exist, or the token has no access to it (status {status})")
            }
            (429 | 500..=599, _) => {
                return Failure::Unreachable(format!(
                    "`{}` answered with status {status} to `{file}`",
                    host(self.endpoint)
                ));
            }
            _ => format!("`{}` answered with status {status} to `{file}` of `{}`", host(self.endpoint), self.name),
        };
        Failure::Final(Error::Hub(message))
    }
}

/// Replaces everything except letters, digits, `.`, `_` and `-`, so that `text` is a plain file name.
pub(super) fn plain_name(text: &str) -> String {
    let name: String =
        text.chars().take(128).map(|c| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' }).collect();
    match name.strip_prefix('.') {
        Some(rest) => format!("-{rest}"),
        None => name,
    }
}

/// Creates the folder of the file `path`.
pub(super) fn create_parent(path: &Path) -> Result<()> {
    create_folder(path.parent().unwrap_or(Path::new(".")))
}

/// The blob name of an etag.
fn etag_name(etag: &str) -> Option<String> {
    let etag = etag.trim().trim_start_matches("W/").trim_matches('"');
    (!etag.is_empty()).then(|| plain_name(etag))
}

/// The scheme and host of an address.
fn host(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    &url[..end]
}

fn same_host(a: &str, b: &str) -> bool {
    host(a).eq_ignore_ascii_case(host(b))
}

/// Resolves `location` relative to `url`.
fn join(url: &str, location: &str) -> Result<String> {
    if location.starts_with("https://") || (location.starts_with("http://") && !url.starts_with("https://")) {
        return Ok(location.to_owned());
    }
    if location.starts_with('/') && !location.starts_with("//") {
        return Ok(format!("{}{location}", host(url)));
    }
    Err(Error::Hub(format!("`{url}` redirects to the unsupported address `{location}`")))
}

/// The first byte of `bytes 100-199/200`.
fn range_start(content_range: &str) -> Option<u64> {
    content_range.trim().strip_prefix("bytes")?.trim().split('-').next()?.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{host, join, plain_name, range_start, same_host};

    #[test]
    fn names_stay_in_their_folder() {
        assert_eq!(plain_name("abc-1.x_2"), "abc-1.x_2");
        for text in ["../../etc", "..", ".", "a/b", "C:\\x"] {
            let name = plain_name(text);
            assert!(!name.contains(['/', '\\', ':']) && !name.starts_with('.'), "{name}");
        }
    }

    #[test]
    fn addresses() {
        assert_eq!(host("http://a:8/b?c"), "http://a:8");
        assert!(same_host("https://A/x", "https://a"));
        assert!(!same_host("https://a.b/x", "https://a"));
        assert_eq!(join("https://a/b/c", "/d?e").unwrap(), "https://a/d?e");
        assert_eq!(join("https://a/b/c", "https://z/d").unwrap(), "https://z/d");
        assert!(join("https://a/b", "http://a/b").is_err());
        assert!(join("https://a/b", "file:///b").is_err());
        assert_eq!(range_start("bytes 100-199/200"), Some(100));
        assert_eq!(range_start("bytes */200"), None);
    }
}
