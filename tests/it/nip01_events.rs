//! NIP-01, events: strict reading, exact ids and signatures, what is stored is what comes back.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sledge::protocol::EventId;

use crate::support::{Binary, Client, Keys, NOW, Relay, ids, json_of};

/// An event object with these fields, its id and signature right for exactly them, whatever their types.
fn signed_value(keys: &Keys, created_at: Value, kind: Value, tags: Value, content: Value) -> Value {
    let form = json!([0, keys.hex(), created_at, kind, tags, content]).to_string();
    let id = EventId(Sha256::digest(form).into());
    let sig = keys.sign_id(&id).to_hex();
    json!({
        "id": id.to_hex(), "pubkey": keys.hex(), "created_at": created_at, "kind": kind, "tags": tags,
        "content": content, "sig": sig,
    })
}

/// Publishes `json`, which must be refused as invalid, and asserts that nothing was stored.
async fn refuse(client: &mut Client, json: &str, id: &str) {
    let (accepted, text) = client.publish_raw(json, id).await;
    assert!(!accepted && text.starts_with("invalid: "), "{json:.300}\nwas answered {accepted} {text}");
    assert_eq!(client.count(&[json!({})]).await, 0, "{json:.300}\nwas stored");
}

/// The same event twice: stored once, and the sender may regard it as delivered both times.
#[tokio::test]
async fn t27_a_repeat_is_a_duplicate_and_not_broadcast() {
    let relay = Relay::start().await;
    let keys = Keys::new(1);
    let (note, last) = (keys.note(NOW, "once"), keys.note(NOW, "last"));
    let mut reader = relay.client().await;
    reader.req("live", &[json!({"kinds": [1]})]).await;
    let mut client = relay.client().await;
    client.store(&note).await;
    let (accepted, text) = client.publish(&note).await;
    assert!(accepted && text.starts_with("duplicate: "), "{text}");
    client.store(&last).await;
    assert_eq!(reader.live_before("live", &last.id.to_hex()).await, ids([&note]));
    assert_eq!(client.count(&[json!({})]).await, 2);
}

/// A forged id, a forged signature and a key that is no key are refused by name, and nothing is stored.
#[tokio::test]
async fn t27_forgeries_are_invalid() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let good = Keys::new(1).note(NOW, "true");
    for change in [
        |event: &mut Value| event["content"] = json!("false"),
        |event: &mut Value| event["created_at"] = json!(NOW - 1),
        |event: &mut Value| event["kind"] = json!(2),
        |event: &mut Value| event["tags"] = json!([["t", "x"]]),
        |event: &mut Value| event["pubkey"] = json!(Keys::new(2).hex()),
        |event: &mut Value| event["pubkey"] = json!("f".repeat(64)),
        |event: &mut Value| event["sig"] = json!("0".repeat(128)),
        |event: &mut Value| event["sig"] = json!(Keys::new(2).sign_id(&Keys::new(1).note(NOW, "true").id).to_hex()),
    ] {
        let mut event: Value = serde_json::from_str(&json_of(&good)).unwrap();
        change(&mut event);
        refuse(&mut client, &event.to_string(), &good.id.to_hex()).await;
    }
    client.store(&good).await;
}

/// Odd characters in content and tags: stored, found by tag, served with the same meaning, also after a restart and
/// through export and import.
#[tokio::test]
async fn t28_every_character_survives() {
    let mut texts: Vec<String> = (0..0x20u8).map(|byte| format!("a{}z", char::from(byte))).collect();
    texts.extend(
        ["\u{7f}", "\u{2028}\u{2029}", "\u{ffff}", "😀\u{10ffff}", "/\\\"", "\u{feff}", "A\u{300}"].map(String::from),
    );
    let keys = Keys::new(1);
    let events: Vec<_> = texts
        .iter()
        .map(|text| keys.draft(1, NOW).tag(["t", text]).tag(["r", "x", text]).content(text).sign())
        .collect();
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    client.store_all(&events).await;
    let relay = relay.restart().await;
    let mut client = relay.client().await;
    for (event, text) in events.iter().zip(&texts) {
        let found = client.query(json!({"#t": [text]})).await;
        assert_eq!(found.ids(), ids([event]), "{text:?}");
        assert_eq!(found.events[0]["content"], json!(text));
        assert_eq!(found.events[0]["tags"], json!([["t", text], ["r", "x", text]]));
    }
    let stopped = relay.stop().await;
    let mut exported = Binary::on(stopped.dir()).export();
    let mut expected: Vec<String> = events.iter().map(json_of).collect();
    exported.sort();
    expected.sort();
    assert_eq!(exported, expected);
    let copy = Binary::new();
    copy.import(&events);
    let mut imported = copy.export();
    imported.sort();
    assert_eq!(imported, expected);
}

/// The same event in other JSON: escapes that need not be, any key order, white space, fields that no NIP knows.
/// All are the same event, and what is served is the canonical form without the extra fields.
#[tokio::test]
async fn t28_any_spelling_is_the_same_event() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let event = Keys::new(1).draft(1, NOW).tag(["t", "A/é"]).content("A/b \"q\" 😀\n").sign();
    let (id, pubkey, sig) = (event.id.to_hex(), event.pubkey.to_hex(), event.sig.to_hex());
    let escaped = r#""tags":[["\u0074","\u0041\/\u00e9"]],"content":"\u0041\/b \u0022q\u0022 \ud83d\ude00\u000a""#;
    let spellings = [
        format!(r#"{{{escaped},"sig":"{sig}","kind":1,"pubkey":"{pubkey}","created_at":{NOW},"id":"{id}"}}"#),
        format!(
            " {{ \"id\" : \"{id}\",\r\n\t\"pubkey\":\"{pubkey}\",\"created_at\" :{NOW} ,\"kind\": 1,{escaped},\"sig\":\"{sig}\" }} "
        ),
        format!(
            r#"{{"seen":[{{"a":[1e99,null]}}],"id":"{id}","pubkey":"{pubkey}","created_at":{NOW},"\u006bind":1,{escaped},"sig":"{sig}","x":{{}}}}"#
        ),
    ];
    for (at, spelling) in spellings.iter().enumerate() {
        let (accepted, text) = client.publish_raw(spelling, &id).await;
        assert!(accepted, "{spelling}: {text}");
        assert_eq!(text.starts_with("duplicate: "), at > 0, "{spelling}: {text}");
    }
    client.subscribe("raw", &[json!({})]).await;
    let served = client.next_frame().await.unwrap().into_text().unwrap();
    assert_eq!(served.as_str(), format!("[\"EVENT\",\"raw\",{}]", json_of(&event)));
}

/// NIP-01 hashes control characters verbatim, most libraries as `\u00xx`: both are accepted.
#[tokio::test]
async fn t28_control_characters_hash_either_way() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let keys = Keys::new(1);
    let mut event = keys.note(NOW, "a\u{1}b");
    client.store(&event).await;
    let verbatim = format!("[0,\"{}\",{NOW},1,[],\"a\u{1}b\"]", keys.hex());
    event.id = EventId(Sha256::digest(verbatim).into());
    event.sig = keys.sign_id(&event.id);
    client.store(&event).await;
}

/// JSON that readers would understand differently is refused: repeated keys, lone surrogates, bytes around it.
#[tokio::test]
async fn t28_ambiguous_json_is_refused() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let event = Keys::new(1).note(NOW, "x");
    let (json, id) = (json_of(&event), event.id.to_hex());
    for repeated in [
        json.replacen("\"kind\":1", "\"kind\":1,\"kind\":1", 1),
        json.replacen("\"kind\":1", "\"kind\":2,\"kind\":1", 1),
        json.replacen("\"content\":\"x\"", "\"content\":\"x\",\"\\u0063ontent\":\"x\"", 1),
        json.replacen("\"tags\":[]", "\"tags\":[],\"tags\":[]", 1),
    ] {
        assert_ne!(repeated, json);
        refuse(&mut client, &repeated, &id).await;
    }
    for not_json in [
        json.replacen("\"x\"", "\"\\ud800\"", 1),
        json.replacen("\"x\"", "\"\\udc00\\ud800\"", 1),
        json.replacen("\"x\"", "\"a\u{1}\"", 1),
        format!("{json},"),
        format!("{json}}}"),
        format!("\u{feff}{json}"),
        json.replacen("\"kind\":1", "\"kind\":01", 1),
        json.replacen(":1,", ":1,,", 1),
    ] {
        assert_ne!(not_json, json);
        client.send(format!("[\"EVENT\",{not_json}]")).await;
        let answer = client.next().await;
        assert!(answer[0] == "NOTICE" || (answer[0] == "OK" && answer[2] == false), "{not_json}: {answer}");
        assert_eq!(client.count(&[json!({})]).await, 0, "{not_json}");
    }
    let deep = json.replacen("\"kind\"", &format!("\"x\":{}{},\"kind\"", "[".repeat(90_000), "]".repeat(90_000)), 1);
    client.send(format!("[\"EVENT\",{deep}]")).await;
    assert!(["NOTICE", "OK"].map(Value::from).contains(&client.next().await[0]));
    client.assert_alive().await;
}

/// Numbers out of range and values of the wrong type are refused even though id and signature are right for them.
#[tokio::test]
async fn t29_types_and_ranges_are_exact() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let keys = Keys::new(1);
    let sign = |created_at: Value, kind: Value, tags: Value, content: Value| {
        signed_value(&keys, created_at, kind, tags, content)
    };
    let (now, one, no_tags, text) = (json!(NOW), json!(1), json!([]), json!("x"));
    for event in [
        sign(now.clone(), json!(65_536), no_tags.clone(), text.clone()),
        sign(now.clone(), json!(-1), no_tags.clone(), text.clone()),
        sign(now.clone(), json!("1"), no_tags.clone(), text.clone()),
        sign(now.clone(), json!(1.0), no_tags.clone(), text.clone()),
        sign(json!(-1), one.clone(), no_tags.clone(), text.clone()),
        sign(json!(1u64 << 63), one.clone(), no_tags.clone(), text.clone()),
        sign(json!(NOW.to_string()), one.clone(), no_tags.clone(), text.clone()),
        sign(json!(NOW as f64), one.clone(), no_tags.clone(), text.clone()),
        sign(now.clone(), one.clone(), json!([[]]), text.clone()),
        sign(now.clone(), one.clone(), json!([["t", 1]]), text.clone()),
        sign(now.clone(), one.clone(), json!([["t", null]]), text.clone()),
        sign(now.clone(), one.clone(), json!([["t", ["x"]]]), text.clone()),
        sign(now.clone(), one.clone(), json!(["t"]), text.clone()),
        sign(now.clone(), one.clone(), json!({}), text.clone()),
        sign(now.clone(), one.clone(), json!(null), text.clone()),
        sign(now.clone(), one.clone(), no_tags.clone(), json!(null)),
        sign(now.clone(), one.clone(), no_tags.clone(), json!(7)),
    ] {
        let id = event["id"].as_str().unwrap();
        refuse(&mut client, &event.to_string(), id).await;
    }
    let good = sign(now, json!(65_535), no_tags, text);
    assert!(client.publish_raw(&good.to_string(), good["id"].as_str().unwrap()).await.0);
}

/// A `created_at` spelled as a fraction or with an exponent would hash the same after reading; it is refused all the
/// same, and so is upper-case hex.
#[tokio::test]
async fn t29_other_spellings_of_numbers_and_hex_are_refused() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let event = Keys::new(1).note(1_000_000_000, "x");
    let (json, id) = (json_of(&event), event.id.to_hex());
    for spelled in ["1000000000.0", "1e9", "1E9", "1000000000.5"] {
        refuse(&mut client, &json.replacen("1000000000", spelled, 1), &id).await;
    }
    for field in ["pubkey", "sig"] {
        let mut value: Value = serde_json::from_str(&json).unwrap();
        value[field] = json!(value[field].as_str().unwrap().to_uppercase());
        refuse(&mut client, &value.to_string(), &id).await;
    }
    let mut value: Value = serde_json::from_str(&json).unwrap();
    value["id"] = json!(id.to_uppercase());
    refuse(&mut client, &value.to_string(), &id.to_uppercase()).await;
    for missing in ["id", "pubkey", "created_at", "kind", "tags", "content", "sig"] {
        let mut value: Value = serde_json::from_str(&json).unwrap();
        value.as_object_mut().unwrap().remove(missing);
        client.send(json!(["EVENT", value]).to_string()).await;
        let answer = client.next().await;
        assert!(answer[0] == if missing == "id" { "NOTICE" } else { "OK" } && answer[2] != true, "{missing}: {answer}");
    }
    client.store(&event).await;
}

/// `created_at` 0 and the edge of the allowed future are accepted, one second beyond is not.
#[tokio::test]
async fn t29_the_future_ends_at_the_limit() {
    let relay = Relay::with(|config| config.limits.created_at_ahead_secs_max = 900).await;
    let mut client = relay.client().await;
    let keys = Keys::new(1);
    let (ahead, text) = client.publish(&keys.note(NOW + 901, "too far")).await;
    assert!(!ahead && text.starts_with("invalid: "), "{text}");
    client.store(&keys.note(NOW + 900, "just right")).await;
    client.store(&keys.note(0, "old")).await;
    relay.set_now(NOW + 1);
    client.store(&keys.note(NOW + 901, "too far")).await;
}

/// A contact list of 5,000 people is an event like any other, and found by the first and the last of them.
#[tokio::test]
async fn t29_a_contact_list_of_5000_is_accepted() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let people: Vec<String> = (0..5_000u32).map(|n| format!("{n:064x}")).collect();
    let list = people.iter().fold(Keys::new(1).draft(3, NOW), |draft, key| draft.tag(["p", key])).sign();
    client.store(&list).await;
    let relay = relay.restart().await;
    let mut client = relay.client().await;
    for person in [&people[0], &people[4_999]] {
        assert_eq!(client.query_ids(json!({"#p": [person]})).await, ids([&list]));
    }
    assert_eq!(client.query_ids(json!({"#p": ["f".repeat(64)]})).await, ids([]));
}

/// A tag value of 100 kB is stored and found by exactly that value, after a restart too.
#[tokio::test]
async fn t30_a_tag_value_of_100_kb_is_indexed_whole() {
    let relay = Relay::start().await;
    let mut client = relay.client().await;
    let long = "x".repeat(100_000);
    let event = Keys::new(1).draft(1, NOW).tag(["r", long.as_str()]).sign();
    client.store(&event).await;
    let relay = relay.restart().await;
    let mut client = relay.client().await;
    assert_eq!(client.query_ids(json!({"#r": [long]})).await, ids([&event]));
    for near in [&long[1..], &format!("{long}x"), &format!("{}y", &long[1..])] {
        assert_eq!(client.query_ids(json!({"#r": [near]})).await, ids([]));
    }
}

/// An answer to an authentication challenge is a secret between two: refused as EVENT, not broadcast, not imported.
#[tokio::test]
async fn t33_auth_events_are_never_stored_or_broadcast() {
    let relay = Relay::start().await;
    let keys = Keys::new(1);
    let auth = keys.draft(22_242, NOW).tag(["relay", "wss://relay.example.com/"]).tag(["challenge", "c"]).sign();
    let last = keys.note(NOW, "last");
    let mut reader = relay.client().await;
    reader.req("live", &[json!({})]).await;
    let mut client = relay.client().await;
    assert!(!client.publish(&auth).await.0);
    client.store(&last).await;
    assert_eq!(reader.live_before("live", &last.id.to_hex()).await, ids([]));
    assert_eq!(client.query_ids(json!({"kinds": [22_242]})).await, ids([]));
    let binary = Binary::new();
    binary.import([&auth, &last]);
    assert_eq!(binary.exported_ids(), ids([&last]));
}
