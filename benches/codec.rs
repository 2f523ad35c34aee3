//! What one event costs before it reaches the store. Limit: BIP-340 verification, about 25 µs; the rest together
//! should stay below a fifth of it.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::hint::black_box;

use sledge::protocol::message::ClientMessage;
use sledge::protocol::verify::Hashed;
use sledge::protocol::{Event, Filter, Verified};
use sledge::store::record;

fn main() {
    divan::main();
}

fn sample() -> Verified<Event> {
    support::events(50).pop().unwrap()
}

fn sample_json() -> String {
    String::from_utf8(sample().canonical().json.to_vec()).unwrap()
}

#[divan::bench]
fn parse_event_message(bencher: divan::Bencher) {
    let message = format!("[\"EVENT\",{}]", sample_json());
    bencher.bench(|| ClientMessage::parse(black_box(&message)));
}

#[divan::bench]
fn canonical_json_and_id(bencher: divan::Bencher) {
    let event = Event::from_json(&sample_json()).unwrap();
    bencher.with_inputs(|| event.clone()).bench_values(|event| Hashed::check(event).unwrap());
}

#[divan::bench]
fn verify_signature(bencher: divan::Bencher) {
    let hashed = Hashed::check(Event::from_json(&sample_json()).unwrap()).unwrap();
    bencher.with_inputs(|| hashed.clone()).bench_values(|hashed| hashed.verify().unwrap());
}

#[divan::bench]
fn record_encode(bencher: divan::Bencher) {
    let event = sample();
    bencher.bench(|| {
        let mut out = Vec::with_capacity(2048);
        record::push_put(&mut out, black_box(&event));
        out
    });
}

#[divan::bench]
fn record_decode_and_match(bencher: divan::Bencher) {
    let mut bytes = Vec::new();
    record::push_put(&mut bytes, &sample());
    let filter = Filter::from_json(r##"{"kinds":[1,7],"#t":["x","y","z"]}"##).unwrap();
    bencher.bench(|| match record::decode(black_box(&bytes)).unwrap().0 {
        record::Record::Put(event) => filter.matches(&event),
        _ => false,
    });
}

#[divan::bench]
fn parse_req_with_20_authors(bencher: divan::Bencher) {
    let authors: Vec<String> = (0..20).map(|number| support::pubkey(&support::author(number)).to_hex()).collect();
    let message = serde_json::json!(["REQ", "feed", {"authors": authors, "kinds": [1, 6], "limit": 100}]).to_string();
    bencher.bench(|| ClientMessage::parse(black_box(&message)));
}
