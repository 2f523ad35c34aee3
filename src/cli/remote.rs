//! Asking the relay that has the store, over its WebSocket: what `query`, `count` and `import` do while it runs.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::http::header::AUTHORIZATION;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use super::control;
use super::filter::Asked;
use crate::auth::pass;
use crate::config::Config;
use crate::error::Error;
use crate::protocol::{Event, EventId, SubscriptionId, message};
use crate::server::control::{Answer as Told, Request};

/// How long the relay may be silent while it owes an answer.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(60);

const SILENT: &str = "does not answer; if it hangs, stop it and run this again";

/// Where the relay is, and what lets the operator in.
pub struct Door {
    url: String,
    pass: Option<String>,
}

impl Door {
    /// The door of the relay on `url` that has the store of these settings. Where its control socket cannot be reached it
    /// is the public one, which is said: private events stay behind it.
    pub fn of_operator(config: &Config, url: String) -> Door {
        let pass = match control::ask(config, Request::Pass, &|_, _| {}) {
            Ok(Told::Pass(pass)) => Some(pass),
            Ok(other) => without_pass(control::strange(&other)),
            Err(error) => without_pass(error),
        };
        Door { url, pass }
    }

    /// The relay's URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The door of everybody.
    #[cfg(test)]
    pub fn public(url: &str) -> Door {
        Door { url: url.to_owned(), pass: None }
    }
}

fn without_pass(error: Error) -> Option<String> {
    super::say(&format!("private events are left out: {error}"));
    None
}

/// A connection to the relay.
pub struct Link {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    url: String,
}

impl Link {
    /// Connects.
    ///
    /// # Errors
    /// [`Error::Failed`], naming the relay.
    pub async fn connect(door: &Door) -> Result<Link, Error> {
        let url = &door.url;
        let unreachable =
            |error: tungstenite::Error| failed(url, &format!("cannot be reached: {error}; stop it and run this again"));
        let mut request = url.as_str().into_client_request().map_err(unreachable)?;
        if let Some(pass) = &door.pass {
            let shown = HeaderValue::from_str(&pass::header(pass)).map_err(|error| unreachable(error.into()))?;
            request.headers_mut().insert(AUTHORIZATION, shown);
        }
        let connecting = tokio::time::timeout(ANSWER_TIME_MAX, tokio_tungstenite::connect_async(request)).await;
        let connected = connecting.map_err(|_| failed(url, SILENT))?;
        let (socket, _) = connected.map_err(unreachable)?;
        Ok(Link { socket, url: url.clone() })
    }

    /// Queues a message.
    ///
    /// # Errors
    /// As [`Link::next`].
    pub async fn feed(&mut self, json: String) -> Result<(), Error> {
        let fed = self.socket.feed(Message::text(json)).await;
        fed.map_err(|error| failed(&self.url, &gone(&error)))
    }

    /// Sends what is queued.
    ///
    /// # Errors
    /// As [`Link::next`].
    pub async fn flush(&mut self) -> Result<(), Error> {
        self.socket.flush().await.map_err(|error| failed(&self.url, &gone(&error)))
    }

    /// The next message: however long it takes, or soon enough where one is `due`. Can be cancelled without losing one.
    ///
    /// # Errors
    /// [`Error::Failed`] when the relay has gone, or is silent for too long.
    pub async fn next(&mut self, due: bool) -> Result<String, Error> {
        if !due {
            return self.receive().await;
        }
        let waiting = tokio::time::timeout(ANSWER_TIME_MAX, self.receive()).await;
        waiting.unwrap_or_else(|_| Err(failed(&self.url, SILENT)))
    }

    async fn receive(&mut self) -> Result<String, Error> {
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Text(text))) => return Ok(text.as_str().to_owned()),
                Some(Ok(Message::Close(_))) | None => {
                    return Err(failed(&self.url, "closed the connection; run this again"));
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(failed(&self.url, &gone(&error))),
            }
        }
    }

    async fn ask(&mut self, verb: &str, id: &SubscriptionId, filters: Vec<Value>) -> Result<(), Error> {
        let mut parts = vec![Value::from(verb), Value::from(id.as_str())];
        parts.extend(filters);
        self.feed(Value::from(parts).to_string()).await?;
        self.flush().await
    }
}

/// What went wrong with which relay.
pub fn failed(url: &str, what: &str) -> Error {
    Error::Failed(format!("the relay on {url} {what}"))
}

fn refused(url: &str, reason: &str) -> Error {
    failed(url, &format!("refused: {reason}; its limits do not hold once it is stopped"))
}

fn gone(error: &tungstenite::Error) -> String {
    format!("went away: {error}; run this again")
}

/// Runs a conversation to its end.
///
/// # Errors
/// Those of the conversation, or when the system gives no sockets.
pub fn block_on<T>(conversation: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::Failed(format!("cannot open sockets: {error}")))?;
    runtime.block_on(conversation)
}

/// A message as far as a question is concerned.
#[derive(Debug, PartialEq)]
enum Answer<'a> {
    Event(&'a str),
    /// With what NIP-67 hints.
    Eose(Option<String>),
    Count(u64, bool),
    Closed(String),
    Other,
}

/// Reads a message as an answer to the question `id`.
fn read<'a>(text: &'a str, id: &SubscriptionId) -> Answer<'a> {
    if let Some(rest) = text.strip_prefix(&message::event_prefix(id)) {
        return rest.strip_suffix(']').map_or(Answer::Other, Answer::Event);
    }
    let parts: Vec<Value> = serde_json::from_str(text).unwrap_or_default();
    let at = |index: usize| parts.get(index).unwrap_or(&Value::Null);
    if at(1).as_str() != Some(id.as_str()) {
        return Answer::Other;
    }
    match at(0).as_str() {
        Some("EOSE") => Answer::Eose(at(2)[0].as_str().map(str::to_owned)),
        Some("CLOSED") => Answer::Closed(at(2).as_str().unwrap_or_default().to_owned()),
        Some("COUNT") => match at(2)["count"].as_u64() {
            Some(count) => Answer::Count(count, at(2)["approximate"] == true),
            None => Answer::Other,
        },
        _ => Answer::Other,
    }
}

/// How many stored events match.
///
/// # Errors
/// [`Error::Failed`] when the relay has gone or refuses.
pub fn count(door: &Door, asked: &[Asked]) -> Result<u64, Error> {
    block_on(async {
        let mut link = Link::connect(door).await?;
        let id = subscription(1);
        link.ask("COUNT", &id, asked.iter().map(|asked| Value::Object(asked.json.clone())).collect()).await?;
        loop {
            match read(&link.next(true).await?, &id) {
                Answer::Count(count, approximate) => {
                    if approximate {
                        super::say("the relay did not count to the end; there are at least so many");
                    }
                    return Ok(count);
                }
                Answer::Closed(reason) => return Err(refused(&door.url, &reason)),
                _ => {}
            }
        }
    })
}

/// Calls `each` with every event that one of the filters matches, newest first, however many the relay gives in one
/// answer.
///
/// # Errors
/// The first of `each`; [`Error::Failed`] when the relay has gone or refuses.
pub fn query(door: &Door, asked: Vec<Asked>, mut each: impl FnMut(&str) -> Result<(), Error>) -> Result<(), Error> {
    block_on(async {
        let mut link = Link::connect(door).await?;
        let mut questions: Vec<Pages> = asked.into_iter().map(Pages::new).collect();
        let mut serial = 0;
        loop {
            for pages in &mut questions {
                while pages.needs_more() {
                    serial += 1;
                    pages.fetch(&mut link, &subscription(serial)).await?;
                }
            }
            let Some(next) = take_next(&mut questions) else { return Ok(()) };
            each(&next.json)?;
        }
    })
}

fn subscription(serial: u64) -> SubscriptionId {
    SubscriptionId::new(&format!("q{serial}")).expect("at most 21 characters")
}

/// A stored event as the relay sent it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Sent {
    created_at: u64,
    id: EventId,
    json: String,
}

/// The matches of one filter, page by page, newest first.
#[derive(Debug)]
struct Pages {
    asked: Asked,
    ready: VecDeque<Sent>,
    /// How many are still wanted; `None`: all.
    left: Option<u64>,
    /// Where the next page begins.
    until: Option<u64>,
    finished: bool,
}

impl Pages {
    fn new(asked: Asked) -> Pages {
        let (left, until) = (asked.filter.limit, asked.filter.until);
        Pages { ready: VecDeque::new(), left, until, finished: left == Some(0), asked }
    }

    fn needs_more(&self) -> bool {
        self.ready.is_empty() && !self.finished
    }

    /// The filter for the next page. Without a limit it asks for more than any relay gives, since only where the relay
    /// cuts does it go on to the end of the second (NIP-67).
    fn request(&self) -> Value {
        let mut json = self.asked.json.clone();
        json.insert("limit".to_owned(), self.left.unwrap_or(u64::MAX).into());
        if let Some(until) = self.until {
            json.insert("until".to_owned(), until.into());
        }
        Value::Object(json)
    }

    async fn fetch(&mut self, link: &mut Link, id: &SubscriptionId) -> Result<(), Error> {
        link.ask("REQ", id, vec![self.request()]).await?;
        let mut rows = Vec::new();
        let hint = loop {
            match read(&link.next(true).await?, id) {
                Answer::Event(json) => rows.push(sent(json).ok_or_else(|| failed(&link.url, "sent no event"))?),
                Answer::Eose(hint) => break hint,
                Answer::Closed(reason) => return Err(refused(&link.url, &reason)),
                Answer::Count(..) | Answer::Other => {}
            }
        };
        link.ask("CLOSE", id, Vec::new()).await?;
        self.take(rows, hint.as_deref()).map_err(|problem| failed(&link.url, problem))
    }

    /// Takes a page, and learns from the hint how to go on.
    fn take(&mut self, mut rows: Vec<Sent>, hint: Option<&str>) -> Result<(), &'static str> {
        if let Some(left) = &mut self.left {
            rows.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= rows.len() as u64;
        }
        let oldest = rows.last().map(|row| row.created_at);
        self.ready.extend(rows);
        if hint == Some("finish") || self.left == Some(0) {
            self.finished = true;
            return Ok(());
        }
        match (hint, oldest) {
            (Some("more"), Some(oldest)) if oldest > 0 => self.until = Some(oldest - 1),
            (Some("more"), Some(_)) => self.finished = true,
            _ => return Err("cannot give the rest: too many events share one second; stop it, and all can be read"),
        }
        Ok(())
    }
}

fn sent(json: &str) -> Option<Sent> {
    let event = Event::from_json(json).ok()?;
    Some(Sent { created_at: event.created_at, id: event.id, json: json.to_owned() })
}

/// The newest of what is ready, taken from every filter that has it.
fn take_next(questions: &mut [Pages]) -> Option<Sent> {
    let heads = questions.iter().filter_map(|pages| pages.ready.front());
    let next = heads.min_by_key(|sent| (Reverse(sent.created_at), sent.id))?.clone();
    for pages in questions {
        if pages.ready.front().is_some_and(|head| head.id == next.id) {
            pages.ready.pop_front();
        }
    }
    Some(next)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::cli::{filter, testing};
    use crate::protocol::message::EoseHint;

    fn rows(dates: &[u64]) -> Vec<Sent> {
        let row = |(at, date): (usize, &u64)| Sent {
            created_at: *date,
            id: EventId([at as u8; 32]),
            json: format!("{date}/{at}"),
        };
        dates.iter().enumerate().map(row).collect()
    }

    fn pages(filter: &str) -> Pages {
        Pages::new(filter::read(filter).unwrap())
    }

    /// What the relay writes is read as what it is, and other questions' answers are left alone.
    #[test]
    fn answers_are_told_apart() {
        let (id, other) = (subscription(1), subscription(2));
        let event = format!("{}{{\"a\":[1]}}]", message::event_prefix(&id));
        assert_eq!(read(&event, &id), Answer::Event("{\"a\":[1]}"));
        assert_eq!(read(&event, &other), Answer::Other);
        assert_eq!(read(&message::eose(&id, EoseHint::More), &id), Answer::Eose(Some("more".to_owned())));
        assert_eq!(read(&message::eose(&id, EoseHint::Unknown), &id), Answer::Eose(None));
        assert_eq!(read(&message::eose(&id, EoseHint::Finish), &other), Answer::Other);
        assert_eq!(read(&message::count(&id, 7, true, None), &id), Answer::Count(7, true));
        assert_eq!(read(&message::count(&id, 7, false, Some("00")), &id), Answer::Count(7, false));
        assert_eq!(read(&message::closed(&id, "error: x"), &id), Answer::Closed("error: x".to_owned()));
        assert_eq!(read(&message::notice("x"), &id), Answer::Other);
        assert_eq!(read("no JSON", &id), Answer::Other);
    }

    /// A limit is counted down over the pages, and each page begins below the second where the one before ended.
    #[test]
    fn pages_go_on_below_the_last_second() {
        let mut pages = pages(r#"{"kinds":[1],"limit":5,"until":90}"#);
        assert_eq!(pages.request(), serde_json::json!({"kinds": [1], "limit": 5, "until": 90}));
        pages.take(rows(&[80, 70, 70]), Some("more")).unwrap();
        assert_eq!(pages.request(), serde_json::json!({"kinds": [1], "limit": 2, "until": 69}));
        pages.take(rows(&[60, 50, 50]), Some("more")).unwrap();
        assert!(pages.finished);
        assert_eq!(pages.ready.len(), 5);
    }

    /// All matches, or an error: the end must be known.
    #[test]
    fn an_answer_without_a_known_end_is_an_error() {
        let mut all = pages("{}");
        assert_eq!(all.request(), serde_json::json!({"limit": u64::MAX}));
        assert!(all.take(rows(&[80]), None).is_err());
        let mut all = pages("{}");
        all.take(rows(&[1, 0]), Some("more")).unwrap();
        assert!(all.finished, "nothing is older than 1970");
        let mut some = pages(r#"{"limit":2}"#);
        some.take(rows(&[80, 80]), None).unwrap();
        assert!(some.finished);
        assert!(!pages(r#"{"limit":0}"#).needs_more());
    }

    /// Several filters: newest first, ties by id, no repeats.
    #[test]
    fn filters_are_merged_newest_first_without_repeats() {
        let all = rows(&[9, 7, 7, 3, 1]);
        let pick = |places: &[usize]| {
            let mut pages = pages("{}");
            pages.take(places.iter().map(|at| all[*at].clone()).collect(), Some("finish")).unwrap();
            pages
        };
        let mut questions = [pick(&[1, 2, 4]), pick(&[0, 1, 3, 4]), pick(&[])];
        let merged: Vec<Sent> = std::iter::from_fn(|| take_next(&mut questions)).collect();
        assert_eq!(merged, all);
    }

    /// A relay that gives three events an answer is asked until everything is there: as from the store itself.
    #[test]
    fn a_relay_is_asked_until_everything_is_there() {
        let folder = tempfile::tempdir().unwrap();
        let notes: Vec<_> =
            (0..20).map(|n| testing::event(1 + n % 2, 100 + u64::from(n / 3), &[], &n.to_string())).collect();
        let mut config = testing::store_with(folder.path(), notes.clone());
        (config.limits.limit_max, config.limits.limit_default) = (3, 2);
        let relay = testing::Relay::start(config);
        let mut expected: Vec<(u64, String)> =
            notes.iter().map(|note| (note.created_at, testing::json(note))).collect();
        expected.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        let expected: Vec<String> = expected.into_iter().map(|(_, json)| json).collect();
        let ask = |filters: &[&str]| {
            let asked = filters.iter().map(|text| filter::read(text).unwrap()).collect();
            let mut found = Vec::new();
            query(&Door::public(&relay.url), asked, |json| {
                found.push(json.to_owned());
                Ok(())
            })
            .unwrap();
            found
        };
        assert_eq!(ask(&["{}"]), expected);
        assert_eq!(ask(&[r#"{"kinds":[2]}"#, r#"{"kinds":[1]}"#, "{}"]), expected);
        assert_eq!(ask(&[r#"{"limit":8}"#]), expected[..8]);
        assert_eq!(ask(&[r#"{"limit":2}"#]), expected[..2]);
        assert_eq!(ask(&[r#"{"limit":4}"#, r#"{"since":106}"#, r#"{"kinds":[]}"#]), expected[..4]);
        assert_eq!(ask(&[r#"{"kinds":[7]}"#]), expected[..0]);
        assert_eq!(
            count(&Door::public(&relay.url), &[filter::read(r#"{"kinds":[1],"limit":1}"#).unwrap()]).unwrap(),
            10
        );
    }

    /// An address where nobody listens is named.
    #[test]
    fn an_unreachable_relay_is_named() {
        let error = count(&Door::public("ws://127.0.0.1:1"), &[]).unwrap_err();
        assert!(error.to_string().contains("relay on ws://127.0.0.1:1 cannot be reached"), "{error}");
    }
}
