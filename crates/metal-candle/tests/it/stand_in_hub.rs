//! A small HTTP server on this machine that answers as the Hub does, and misbehaves when asked to.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// How the server answers.
#[derive(Debug, Clone, Default)]
pub struct Behaviour {
    /// Files by name.
    pub files: HashMap<String, Vec<u8>>,
    /// The token without which everything is 401.
    pub token: Option<String>,
    /// The next answers with a body end after this many bytes.
    pub break_off_after: Option<usize>,
    /// How many answers are broken off.
    pub breaks_left: usize,
    /// Whether `Range` is understood.
    pub ranges: bool,
    /// Whether weights are redirected to another path, as the Hub does for large files.
    pub redirect: bool,
}

/// The running server.
pub struct StandInHub {
    pub endpoint: String,
    pub behaviour: Arc<Mutex<Behaviour>>,
    /// Request lines with the `Range` header, in order: `GET /a/b/resolve/main/config.json bytes=0-`.
    pub requests: Arc<Mutex<Vec<String>>>,
}

pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

impl StandInHub {
    pub fn start(behaviour: Behaviour) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let behaviour = Arc::new(Mutex::new(behaviour));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (shared, log) = (behaviour.clone(), requests.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (shared, log) = (shared.clone(), log.clone());
                std::thread::spawn(move || answer(stream, &shared, &log));
            }
        });
        Self { endpoint, behaviour, requests }
    }

    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

fn answer(mut stream: TcpStream, behaviour: &Mutex<Behaviour>, log: &Mutex<Vec<String>>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_owned();
    let (mut range, mut authorization) = (String::new(), String::new());
    loop {
        let mut header = String::new();
        reader.read_line(&mut header).ok()?;
        let Some((name, value)) = header.trim().split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "range" => value.trim().clone_into(&mut range),
            "authorization" => value.trim().clone_into(&mut authorization),
            _ => {}
        }
    }
    log.lock().unwrap().push(format!("GET {path} {range}").trim().to_owned());

    let mut state = behaviour.lock().unwrap();
    let mut respond = |status: &str, headers: &str, body: &[u8], length: usize| {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n");
        stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).ok()
    };
    let (name, on_storage) = match path.strip_prefix("/storage/") {
        Some(name) => (name, true),
        None => (path.rsplit('/').next()?, false),
    };
    if state.token.as_ref().is_some_and(|token| authorization != format!("Bearer {token}")) {
        return respond("401 Unauthorized", "X-Error-Code: RepoNotFound\r\n", b"", 0);
    }
    if !on_storage && !path.starts_with("/org/model/resolve/") {
        return respond("404 Not Found", "X-Error-Code: RepoNotFound\r\n", b"", 0);
    }
    if !on_storage && !path.contains("/resolve/main/") && !path.contains(COMMIT) {
        return respond("404 Not Found", "X-Error-Code: RevisionNotFound\r\n", b"", 0);
    }
    let Some(body) = state.files.get(name).cloned() else {
        return respond("404 Not Found", "X-Error-Code: EntryNotFound\r\n", b"", 0);
    };
    let etag = format!("{:x}-{}", body.iter().fold(7_u64, |h, b| h.wrapping_mul(31) + u64::from(*b)), body.len());
    let commit = format!("X-Repo-Commit: {COMMIT}\r\n");
    if state.redirect && name.ends_with(".safetensors") && !on_storage {
        let headers = format!(
            "{commit}X-Linked-Etag: \"{etag}\"\r\nX-Linked-Size: {}\r\nLocation: /storage/{name}\r\n",
            body.len()
        );
        return respond("302 Found", &headers, b"", 0);
    }
    let start: Option<usize> =
        range.strip_prefix("bytes=").and_then(|r| r.split('-').next()?.parse().ok()).filter(|_| state.ranges);
    let (status, headers, from) = match start {
        Some(start) if start >= body.len() => {
            let headers = format!("Content-Range: bytes */{}\r\n", body.len());
            return respond("416 Range Not Satisfiable", &headers, b"", 0);
        }
        Some(start) => {
            let headers = format!("Content-Range: bytes {start}-{}/{}\r\n", body.len() - 1, body.len());
            ("206 Partial Content", headers, start)
        }
        None => ("200 OK", String::new(), 0),
    };
    let headers = format!("{commit}ETag: W/\"{etag}\"\r\n{headers}");
    let rest = &body[from..];
    let mut sent = rest.len();
    if let Some(limit) = state.break_off_after.filter(|limit| state.breaks_left > 0 && *limit < rest.len()) {
        state.breaks_left -= 1;
        sent = limit;
    }
    respond(status, &headers, &rest[..sent], rest.len())
}
