//! HTTP/1.1 on the relay's one address: the upgrade to WebSocket, the relay information document (NIP-11), the management API
//! (NIP-86, in [`super::admin`]), the page for browsers, and `/healthz` for load balancers and service managers.
//!
//! A connection has one request and `handshake_timeout_ms` for all of it, so a client that sends its header drop by drop
//! does not hold a place for long.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode, Version};
use hyper_util::rt::TokioIo;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::about;
use super::admin::{self, Admin};
use super::deflate::{self, Agreed};
use super::open::Open;
use super::places::{Place, Places};
use super::rate::Clients;
use super::socket::Socket;
use crate::auth::{Authority, Pass};
use crate::config::Live;
use crate::protocol::relay_info::RelayInfo;
use crate::relay::Relay;

/// Bytes of a request's header.
const HEADER_BYTES_MAX: usize = 16 * 1024;

/// How long browsers may reuse the answer to a CORS preflight, seconds.
const PREFLIGHT_SECS: &str = "86400";

/// What pages may send. A star does not stand for `Authorization`.
const ALLOWED_HEADERS: HeaderValue = HeaderValue::from_static("*, Authorization, Content-Type, Accept");

/// Answers requests by these settings.
pub struct Http {
    relay: Arc<Relay>,
    config: Live,
    admin: Admin,
    places: Places,
    clients: Arc<Clients>,
    pass: Pass,
}

/// A socket that has shaken hands.
pub struct Shaken {
    /// The socket.
    pub socket: Socket,
    /// What the client sent behind its request.
    pub read: Bytes,
    /// How messages are compressed, if they are.
    pub deflate: Option<Agreed>,
    /// Who is there.
    pub client: Client,
}

/// The other end of a connection.
pub struct Client {
    /// Its address, as a trusted proxy says or as the socket does.
    pub ip: IpAddr,
    /// Whether it is the peer itself: a program on this machine, or a trusted proxy that forwards nobody.
    pub is_local: bool,
    /// The local name under which the client has reached the relay; `None` for a public one.
    pub reached: Option<Authority>,
    /// Whether the client has shown the operator's pass.
    pub is_operator: bool,
    /// Of its address where a proxy forwards it; held as long as the connection.
    _place: Place,
}

/// Where the answer to an upgrade leaves what the connection goes on with.
type Slot = Mutex<Option<(OnUpgrade, Option<Agreed>, Client)>>;

impl Http {
    /// Answers for `relay`; connections in `open` are closed when their address is blocked.
    pub fn new(relay: Arc<Relay>, clients: Arc<Clients>, open: Arc<Open>) -> Self {
        let config = relay.live_config().clone();
        let pass = Pass::new(secp256k1::rand::random());
        Http { admin: Admin::new(relay.clone(), open), relay, config, places: Places::default(), clients, pass }
    }

    /// What the operator's commands show when they connect.
    pub fn pass(&self) -> &Pass {
        &self.pass
    }

    /// A place for a connection from `peer`, if that address has one left and is neither blocked nor shut out. Proxies
    /// that are trusted have always one: their clients are counted once they are known.
    pub fn admit(&self, peer: IpAddr, now: Instant) -> Option<Place> {
        let limits = &self.config.load().limits;
        if limits.trusts_proxy(peer) {
            return Some(Place::unlimited());
        }
        let is_kept_out = self.relay.policy().blocks(peer) || self.clients.is_banned(peer, now);
        if is_kept_out { None } else { self.places.take(peer, limits.connections_per_ip_max) }
    }

    /// Serves the one request of a connection. Returns the socket if it asked for a WebSocket.
    pub async fn serve(&self, socket: Socket, peer: SocketAddr) -> Option<Shaken> {
        let is_encrypted = socket.is_encrypted();
        let slot = Slot::default();
        let service = service_fn(async |mut request: Request<Incoming>| {
            if is_encrypted {
                // What a proxy in front would say.
                request.headers_mut().insert("x-forwarded-proto", HeaderValue::from_static("https"));
            }
            let mut response = self.answer(request, peer.ip(), &slot).await;
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                // hyper's own switch for this would also strip the upgrade of its `Connection` header.
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, Infallible>(response)
        });
        let served = hyper::server::conn::http1::Builder::new()
            .max_buf_size(HEADER_BYTES_MAX)
            .serve_connection(TokioIo::new(socket), service)
            .with_upgrades();
        if let Err(error) = served.await {
            tracing::debug!(%error, "no HTTP");
            return None;
        }
        let (upgrade, deflate, client) = slot.into_inner().unwrap_or_else(PoisonError::into_inner)?;
        let parts = upgrade.await.ok()?.downcast::<TokioIo<Socket>>().ok()?;
        Some(Shaken { socket: parts.io.into_inner(), read: parts.read_buf, deflate, client })
    }

    async fn answer(&self, request: Request<Incoming>, peer: IpAddr, slot: &Slot) -> Response<Full<Bytes>> {
        let client = self.forwarded_ip(request.headers(), peer).unwrap_or(peer).to_canonical();
        if self.relay.policy().blocks(client) {
            return text(StatusCode::FORBIDDEN, "this address is not served here\n");
        }
        if admin::is_call(&request) {
            return cors(self.admin.answer(request, client).await);
        }
        match (request.method(), request.uri().path()) {
            (&Method::OPTIONS, _) => preflight(),
            (&Method::GET | &Method::HEAD, "/healthz") => match self.relay.problem() {
                None => text(StatusCode::OK, "ok\n"),
                Some(_) => text(StatusCode::SERVICE_UNAVAILABLE, "the store takes no writes\n"),
            },
            (&Method::GET | &Method::HEAD, "/") => self.answer_root(request, peer, slot),
            (&Method::GET | &Method::HEAD, _) => text(StatusCode::NOT_FOUND, "not found\n"),
            _ => {
                let mut response = text(
                    StatusCode::METHOD_NOT_ALLOWED,
                    "only GET is answered here, and POST of application/nostr+json+rpc\n",
                );
                response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD, OPTIONS"));
                response
            }
        }
    }

    fn answer_root(&self, request: Request<Incoming>, peer: IpAddr, slot: &Slot) -> Response<Full<Bytes>> {
        let headers = request.headers();
        if has_token(headers, header::UPGRADE, "websocket") {
            return self.upgrade(request, peer, slot);
        }
        let mut response = if accepts(headers, "application/nostr+json") {
            let document = serde_json::to_vec(&self.info()).expect("strings and numbers become JSON");
            cors(respond(StatusCode::OK, "application/nostr+json", document.into()))
        } else {
            let page = about::page(&self.info(), &self.url_for(headers));
            let mut response = respond(StatusCode::OK, "text/html; charset=utf-8", page.into());
            let policy = HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'");
            response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
            response
        };
        // One address, two answers: a cache must not give the one for the other.
        response.headers_mut().insert(header::VARY, HeaderValue::from_static("Accept"));
        response
    }

    /// What is told now: a reload or an admin may have changed it.
    fn info(&self) -> RelayInfo {
        about::relay_info(&self.config.load(), self.relay.policy())
    }

    fn upgrade(&self, mut request: Request<Incoming>, peer: IpAddr, slot: &Slot) -> Response<Full<Bytes>> {
        let accept = match accept_key(&request) {
            Ok(accept) => accept,
            Err(refusal) => return *refusal,
        };
        let client = match self.client(request.headers(), peer) {
            Ok(client) => client,
            Err(refusal) => return text(StatusCode::TOO_MANY_REQUESTS, refusal),
        };
        let deflate = match self.config.load().limits.compress_messages {
            true => deflate::negotiate(request.headers()),
            false => None,
        };
        let upgrade = hyper::upgrade::on(&mut request);
        let agreed = deflate.as_ref().map(|(agreed, _)| *agreed);
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some((upgrade, agreed, client));
        let mut response = Response::new(Full::default());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
        if let Some((_, answer)) = deflate {
            headers.insert(header::SEC_WEBSOCKET_EXTENSIONS, answer);
        }
        response
    }

    /// Who asks for a WebSocket, or why it gets none.
    fn client(&self, headers: &HeaderMap, peer: IpAddr) -> Result<Client, &'static str> {
        let limits = &self.config.load().limits;
        let Some(ip) = self.forwarded_ip(headers, peer) else {
            let is_local = peer.to_canonical().is_loopback() || limits.trusts_proxy(peer);
            return Ok(self.client_at(headers, peer, is_local, Place::unlimited()));
        };
        if self.clients.is_banned(ip, Instant::now()) {
            self.relay.counters().turned_away.add(1);
            return Err("your address is shut out for a while\n");
        }
        let place =
            self.places.take(ip, limits.connections_per_ip_max).ok_or("too many connections from your address\n")?;
        Ok(self.client_at(headers, ip, false, place))
    }

    fn client_at(&self, headers: &HeaderMap, ip: IpAddr, is_local: bool, place: Place) -> Client {
        let ip = ip.to_canonical();
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let reached = host.and_then(|host| Authority::guess(host, ip));
        let authorization = headers.get(header::AUTHORIZATION);
        let is_operator = authorization.is_some_and(|shown| self.pass.is_shown_by(shown.as_bytes()));
        Client { ip, is_local, reached, is_operator, _place: place }
    }

    /// Whose connection a trusted proxy forwards: the last entry of its list that is not such a proxy itself. `None`
    /// where the peer is no trusted proxy, or does not say.
    fn forwarded_ip(&self, headers: &HeaderMap, peer: IpAddr) -> Option<IpAddr> {
        let limits = &self.config.load().limits;
        if !limits.trusts_proxy(peer) {
            return None;
        }
        let forwarded = headers.get_all("x-forwarded-for").into_iter().filter_map(|value| value.to_str().ok());
        let mut chain: Vec<&str> = forwarded.flat_map(|value| value.split(',')).map(str::trim).collect();
        if chain.is_empty() {
            chain.extend(headers.get("x-real-ip").and_then(|value| value.to_str().ok()));
        }
        let mut client = None;
        for ip in chain.iter().rev().map_while(|entry| entry.parse::<IpAddr>().ok()) {
            client = Some(ip);
            if !limits.trusts_proxy(ip) {
                break;
            }
        }
        client
    }

    /// The address that a person can paste into a client.
    fn url_for(&self, headers: &HeaderMap) -> String {
        let service_url = &self.config.load().service_url;
        if !service_url.is_empty() {
            return service_url.clone();
        }
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("localhost");
        let is_https = headers.get("x-forwarded-proto").is_some_and(|proto| proto == "https");
        format!("{}://{host}", if is_https { "wss" } else { "ws" })
    }
}

/// The `Sec-WebSocket-Accept` of a well-formed upgrade request (RFC 6455 4.2), or what is wrong with it.
fn accept_key(request: &Request<Incoming>) -> Result<HeaderValue, Box<Response<Full<Bytes>>>> {
    let headers = request.headers();
    let refuse = |status, problem| Err(Box::new(text(status, problem)));
    if request.method() != Method::GET || request.version() != Version::HTTP_11 {
        return refuse(StatusCode::BAD_REQUEST, "a WebSocket begins with GET and HTTP/1.1\n");
    }
    if !has_token(headers, header::CONNECTION, "upgrade") {
        return refuse(StatusCode::BAD_REQUEST, "the header Connection: Upgrade is missing\n");
    }
    if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
        let mut response = text(StatusCode::UPGRADE_REQUIRED, "only WebSocket version 13 is spoken here\n");
        response.headers_mut().insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        return Err(Box::new(response));
    }
    // Sixteen bytes in Base64.
    let key = headers.get(header::SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes);
    match key.filter(|key| key.len() == 24 && key.ends_with(b"==")) {
        Some(key) => Ok(HeaderValue::from_str(&derive_accept_key(key)).expect("Base64 is a header value")),
        None => refuse(StatusCode::BAD_REQUEST, "the header Sec-WebSocket-Key is missing or malformed\n"),
    }
}

/// Whether a list header names `token`, in any case.
fn has_token(headers: &HeaderMap, name: HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|item| item.trim().eq_ignore_ascii_case(token))
}

fn accepts(headers: &HeaderMap, media_type: &str) -> bool {
    let values = headers.get_all(header::ACCEPT).into_iter().filter_map(|value| value.to_str().ok());
    let mut items = values.flat_map(|value| value.split(',')).map(|item| item.split(';').next().unwrap_or_default());
    items.any(|item| item.trim().eq_ignore_ascii_case(media_type))
}

fn respond(status: StatusCode, content_type: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

fn text(status: StatusCode, body: &'static str) -> Response<Full<Bytes>> {
    respond(status, "text/plain; charset=utf-8", Bytes::from_static(body.as_bytes()))
}

fn preflight() -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response.headers_mut().insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(PREFLIGHT_SECS));
    cors(response)
}

/// Lets pages of any origin read the answer (NIP-11).
fn cors(mut response: Response<Full<Bytes>>) -> Response<Full<Bytes>> {
    let headers = response.headers_mut();
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, ALLOWED_HEADERS);
    headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST, OPTIONS"));
    response
}
