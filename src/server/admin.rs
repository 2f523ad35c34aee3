//! The relay management API (NIP-86): JSON over HTTP on the relay's own address, authorised by NIP-98.
//!
//! In: a POST of type `application/nostr+json+rpc`. Out: `{"result": …}` or `{"error": …}`; 401 for whoever is not
//! authorised, 403 for whoever is and may not. Nothing is read that is larger than a bound, and nothing is acted upon
//! before the token holds.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::open::Open;
use crate::auth::Authority;
use crate::auth::http::{self as http_auth, HttpAuthError, Spent, Token};
use crate::relay::Relay;
use crate::relay::policy::admin::{Answer, Call};
use crate::relay::policy::methods::Caller;

/// The type of requests and answers.
pub const CONTENT_TYPE: &str = "application/nostr+json+rpc";

/// Bytes of a request's body: far above the longest description.
const BODY_BYTES_MAX: usize = 64 * 1024;

/// The API of one relay.
pub struct Admin {
    relay: Arc<Relay>,
    open: Arc<Open>,
    spent: Mutex<Spent>,
}

/// A call, as NIP-86 writes it.
#[derive(Deserialize)]
struct Body {
    method: String,
    #[serde(default)]
    params: Vec<Value>,
}

/// Whether a request is for the management API.
pub fn is_call(request: &Request<Incoming>) -> bool {
    let content_type = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let media_type = content_type.and_then(|value| value.split(';').next()).unwrap_or_default();
    request.method() == Method::POST && media_type.trim().eq_ignore_ascii_case(CONTENT_TYPE)
}

impl Admin {
    /// The API of `relay`; connections in `open` are closed when their address is blocked.
    pub fn new(relay: Arc<Relay>, open: Arc<Open>) -> Self {
        let spent = Mutex::new(Spent::since(relay.now()));
        Admin { relay, open, spent }
    }

    /// Answers a call of a client at `ip`.
    pub async fn answer(&self, request: Request<Incoming>, ip: IpAddr) -> Response<Full<Bytes>> {
        let (parts, body) = request.into_parts();
        let header = parts.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let Some(header) = header else { return unauthorised(&HttpAuthError::WrongScheme) };
        let body = match Limited::new(body, BODY_BYTES_MAX).collect().await {
            Ok(body) => body.to_bytes(),
            Err(_) => return failed(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large or was cut off"),
        };
        let host = parts.headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let reached = host.and_then(|host| Authority::guess(host, ip));
        let url = &self.relay.config().service_url;
        let public = Authority::of_url(url);
        let own: Vec<&Authority> = public.iter().chain(&reached).collect();
        let request = http_auth::Request {
            method: "POST",
            own: &own,
            paths: &[parts.uri.path().trim_end_matches('/'), path_of(url)],
            query: parts.uri.query(),
            body: &body,
        };
        match self.authorise(header, &request) {
            Ok(token) => self.carry_out(token, &body).await,
            Err(error) => {
                tracing::debug!(%error, "a management call was not authorised");
                unauthorised(&error)
            }
        }
    }

    fn authorise(&self, header: &str, request: &http_auth::Request<'_>) -> Result<Token, HttpAuthError> {
        let now = self.relay.now();
        let token = http_auth::check(header, request, now)?;
        // Strangers are turned away anyway, and must not fill the memory.
        if self.relay.policy().may_manage(&token.key) {
            self.spent.lock().unwrap_or_else(PoisonError::into_inner).spend(&token, now)?;
        }
        Ok(token)
    }

    async fn carry_out(&self, token: Token, body: &[u8]) -> Response<Full<Bytes>> {
        if !self.relay.policy().may_manage(&token.key) {
            return failed(StatusCode::FORBIDDEN, "this key does not manage this relay");
        }
        let Ok(Body { method, params }) = serde_json::from_slice(body) else {
            return failed(StatusCode::BAD_REQUEST, "the body must be {\"method\": text, \"params\": array}");
        };
        let call = Call { caller: Caller::Key(token.key), method, params };
        match manage(&self.relay, &self.open, call).await {
            Some(Ok(result)) => respond(StatusCode::OK, &json!({ "result": result })),
            Some(Err(problem)) => failed(StatusCode::OK, &problem),
            None => failed(StatusCode::SERVICE_UNAVAILABLE, "the relay is stopping"),
        }
    }
}

/// The path of a URL, which a proxy may take off, without a slash at its end.
fn path_of(url: &str) -> &str {
    let path = url.split_once("://").and_then(|(_, rest)| rest.find('/').map(|slash| &rest[slash..]));
    path.unwrap_or_default().trim_end_matches('/')
}

/// Has a call carried out, and closes the connections that it has blocked. `None`: the relay is stopping.
pub async fn manage(relay: &Arc<Relay>, open: &Open, call: Call) -> Option<Result<Value, String>> {
    let (tell, told) = tokio::sync::oneshot::channel();
    let relay = relay.clone();
    tokio::task::spawn_blocking(move || {
        relay.manage(call, move |answer| {
            // Whoever called may have gone; the decision stands.
            let _ = tell.send(answer);
        });
    });
    let Answer { result, block } = told.await.ok()?;
    if let Some(range) = block {
        open.expel(range);
    }
    Some(result)
}

fn unauthorised(error: &HttpAuthError) -> Response<Full<Bytes>> {
    let mut response = failed(StatusCode::UNAUTHORIZED, &error.to_string());
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Nostr"));
    response
}

fn failed(status: StatusCode, problem: &str) -> Response<Full<Bytes>> {
    respond(status, &json!({ "error": problem }))
}

fn respond(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
