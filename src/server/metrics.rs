//! Figures for Prometheus, on an address of their own: what an operator sees is nobody else's business, so they are never
//! on the relay's public port, and off unless an address is set.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Shared;
use super::control::Status;
use crate::relay::counters::REASONS;

/// Connections at a time; a scraper needs one.
const PEERS_MAX: usize = 8;
/// Time for one request and its answer.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(10);

/// Serves the figures of `shared` until `stopping`.
pub(super) async fn serve(listener: TcpListener, shared: Arc<Shared>, mut stopping: watch::Receiver<bool>) {
    let mut peers = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = peers.join_next() => continue,
            _ = stopping.wait_for(|stop| *stop) => return,
        };
        match accepted {
            Ok((socket, _)) if peers.len() < PEERS_MAX => {
                let shared = shared.clone();
                peers.spawn(async move {
                    if timeout(REQUEST_TIME_MAX, answer(socket, shared)).await.is_err() {
                        tracing::debug!("a request for metrics took too long");
                    }
                });
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "accepting a connection for metrics failed");
                tokio::time::sleep(super::ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The address that metrics are served on, bound.
///
/// # Errors
/// When it cannot be listened on.
pub(super) async fn listen(addr: SocketAddr) -> std::io::Result<TcpListener> {
    let listener = TcpListener::bind(addr).await?;
    tracing::info!(addr = %listener.local_addr()?, "metrics are served");
    Ok(listener)
}

async fn answer(socket: TcpStream, shared: Arc<Shared>) {
    let service = service_fn(|request: Request<Incoming>| {
        let shared = shared.clone();
        async move { Ok::<_, Infallible>(response(&request, shared).await) }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(socket), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "no HTTP on the metrics address");
    }
}

async fn response(request: &Request<Incoming>, shared: Arc<Shared>) -> Response<Full<Bytes>> {
    let plain = |status, body: &'static str| {
        let mut response = Response::new(Full::new(Bytes::from_static(body.as_bytes())));
        *response.status_mut() = status;
        response
    };
    if request.method() != Method::GET || request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "the metrics are at /metrics\n");
    }
    // The writer may hold the figures for as long as a disk takes.
    let Ok(status) = tokio::task::spawn_blocking(move || shared.status()).await else {
        return plain(StatusCode::INTERNAL_SERVER_ERROR, "the figures cannot be had\n");
    };
    let mut response = Response::new(Full::new(encode(status).into()));
    let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

/// The figures in the OpenMetrics text format.
fn encode(status: Status) -> String {
    let mut registry = Registry::with_prefix("sledge");
    registry.register_collector(Box::new(Figures(status)));
    let mut out = String::new();
    text::encode(&mut out, &registry).expect("writing to a string does not fail");
    out
}

/// One report, as the library wants to collect it.
#[derive(Debug)]
struct Figures(Status);

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let status = &self.0;
        self.gauges(&mut encoder)?;
        let (figures, queries) = (&status.figures, &status.queries);
        for (name, help, value) in [
            ("events_stored", "Events stored, or passed on when ephemeral", figures.stored),
            ("events_duplicate", "Events that were there already", figures.duplicate),
            ("deliveries", "Live events put into the queues of connections", figures.deliveries),
            ("connections_opened", "Connections that shook hands", figures.connections),
            ("connections_turned_away", "Connections without a place, or shut out", figures.turned_away),
            ("connections_too_slow", "Connections closed because they did not keep up", figures.too_slow),
            ("messages", "Messages of clients", figures.messages),
            ("queries", "REQ and COUNT that came to an end", queries.finished),
            ("queries_closed", "Queries closed for taking too long", queries.closed),
            ("query_rows", "Events that queries gave or counted", queries.rows),
        ] {
            encode_metric(&mut encoder, name, help, None, &ConstCounter::new(value))?;
        }
        for (name, help, value) in [
            ("message", "Bytes of messages of clients", figures.message_bytes),
            ("sent", "Bytes written to clients", figures.sent_bytes),
        ] {
            encode_metric(&mut encoder, name, help, Some(&Unit::Bytes), &ConstCounter::new(value))?;
        }
        let seconds = ConstCounter::new(queries.micros as f64 / 1e6);
        encode_metric(&mut encoder, "query", "Time that query threads have worked", Some(&Unit::Seconds), &seconds)?;
        let refused = Family::<[(&str, &str); 1], Total>::default();
        for (reason, count) in REASONS.iter().zip(figures.refused) {
            refused.get_or_create(&[("reason", *reason)]).inc_by(count);
        }
        encode_metric(&mut encoder, "events_refused", "Events refused, by the first word of the answer", None, &refused)
    }
}

type Total = prometheus_client::metrics::counter::Counter;

impl Figures {
    fn gauges(&self, encoder: &mut DescriptorEncoder) -> Result<(), std::fmt::Error> {
        let Status { stats, queues, .. } = &self.0;
        for (name, help, value) in [
            ("healthy", "1 while the store takes writes, else 0", u64::from(self.0.problem.is_none())),
            ("connections", "Clients connected", self.0.connections as u64),
            ("subscriptions", "Their open subscriptions", self.0.subscriptions as u64),
            ("banned_addresses", "Addresses that are shut out for garbage", self.0.banned as u64),
            ("events", "Events that can be read", stats.events),
            ("index_entries_buffered", "Index entries that are only in memory", stats.buffered_entries),
            ("writer_queue_events", "Events that wait for the writer", queues.writer_events as u64),
            ("queries_waiting", "Queries that wait for a thread", self.0.queries.waiting),
        ] {
            encode_metric(encoder, name, help, None, &ConstGauge::new(value))?;
        }
        for (name, help, value) in [
            ("log", "Size of the event log", stats.log_bytes),
            ("log_dead", "What compaction would free of it", stats.dead_bytes),
            ("index", "Size of the index on disk", stats.index_bytes),
        ] {
            encode_metric(encoder, name, help, Some(&Unit::Bytes), &ConstGauge::new(value))?;
        }
        if let Some(free) = queues.disk_free_bytes {
            let help = "Free on the disk that holds the store";
            encode_metric(encoder, "disk_free", help, Some(&Unit::Bytes), &ConstGauge::new(free))?;
        }
        encode_metric(
            encoder,
            "uptime",
            "Time since the start",
            Some(&Unit::Seconds),
            &ConstGauge::new(self.0.uptime_secs),
        )
    }
}

fn encode_metric(
    encoder: &mut DescriptorEncoder,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    metric: &impl EncodeMetric,
) -> Result<(), std::fmt::Error> {
    metric.encode(encoder.encode_descriptor(name, help, unit, metric.metric_type())?)
}
