//! Settings: one map for all devices, each field a last-writer-wins register.
//!
//! In: verified events of kind 10001 with our label, and of kind 30078. Out: the merged fields, which versions are heads
//! (no other version names them), and whether a merge is to be published. Whoever writes says everything it knows and
//! names every head it merged; so a head contains all that came before it, and the older ones may be forgotten.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::chat::with_drafts;
use super::cipher::{self, Cipher, SealError};
use super::clock::{Device, Hlc};
use super::draft::{Draft, Op, SettingsForm};
use super::fields::{Field, Fields};
use super::shape::{DOCUMENT_PREFIX, SETTINGS, SETTINGS_DOCUMENT, Schema, Unsigned, tag};
use crate::protocol::supersede::Version;
use crate::protocol::{Event, EventId};

/// Most heads that one version names; relays keep no more (the newest).
pub const HEADS_MAX: usize = 16;
/// Settings whose names start so belong to one device.
pub const DEVICE_PREFIX: &str = "device.";
/// Settings whose names start so are secrets.
pub const SECRET_PREFIX: &str = "secret.";

/// Where a setting may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// To all devices.
    Sync,
    /// Nowhere: it is about this device.
    Device,
    /// To all devices only if the user asks for it with each write.
    Secret,
}

impl Class {
    /// The class of a setting, by its name.
    pub fn of(name: &str) -> Self {
        if name.starts_with(DEVICE_PREFIX) {
            Class::Device
        } else if name.starts_with(SECRET_PREFIX) {
            Class::Secret
        } else {
            Class::Sync
        }
    }
}

/// Why a setting does not leave the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StaysHere {
    /// [`Class::Device`].
    #[error("settings under device. stay on this device")]
    Device,
    /// [`Class::Secret`], and the user did not ask for it.
    #[error("settings under secret. leave this device only when that is asked for")]
    Secret,
}

/// The encrypted content, in either form.
#[derive(Serialize, Deserialize)]
struct Body {
    v: u32,
    dev: String,
    f: Fields,
}

/// A field on which heads disagree.
#[derive(Clone, Debug, PartialEq)]
pub struct Conflict {
    /// Its name.
    pub name: String,
    /// What every device takes.
    pub winner: Field,
    /// What other heads say.
    pub others: Vec<Field>,
}

/// A person's settings.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    fields: Fields,
    heads: BTreeMap<EventId, (u64, Fields)>,
    /// Versions that an accepted one names: no heads, also if they come later.
    named: BTreeSet<EventId>,
    /// The version of each device's document.
    documents: BTreeMap<String, Version>,
}

impl Settings {
    /// Takes a version in either form; its latest stamp.
    ///
    /// # Errors
    /// What is wrong with the event, judged from the event alone.
    pub fn take(&mut self, event: &Event, cipher: &dyn Cipher) -> Result<Hlc, &'static str> {
        if event.pubkey != cipher.pubkey() {
            return Err("somebody else's settings");
        }
        let plain =
            cipher::open(cipher, &event.pubkey, &event.tags, &event.content).ok_or("not sealed for this key")?;
        let body: Body = serde_json::from_str(&plain).map_err(|_| "the content is not that of settings")?;
        if body.v != 1 {
            return Err("a version of settings that is not known here");
        }
        if !body.f.are_valid_in(event.created_at) {
            return Err("a stamp lies after the event's created_at");
        }
        let latest = body.f.latest();
        self.fields.merge(&body.f);
        match event.kind {
            SETTINGS => self.take_version(event, body.f),
            SETTINGS_DOCUMENT => self.take_document(event)?,
            _ => return Err("settings are of kind 10001 or 30078"),
        }
        Ok(latest)
    }

    fn take_version(&mut self, event: &Event, fields: Fields) {
        let named = event.tags.values("prev").filter_map(EventId::from_hex).take(HEADS_MAX);
        for id in named {
            self.heads.remove(&id);
            self.named.insert(id);
        }
        if !self.named.contains(&event.id) {
            self.heads.insert(event.id, (event.created_at, fields));
        }
    }

    fn take_document(&mut self, event: &Event) -> Result<(), &'static str> {
        let d = event.tags.find("d").and_then(|tag| tag.value()).unwrap_or_default();
        let device =
            d.strip_prefix(DOCUMENT_PREFIX).ok_or("the d tag of a settings document starts with oa:settings:")?;
        let version = Version::of(event);
        let have = self.documents.entry(device.to_owned()).or_insert(version);
        if version.replaces(have) {
            *have = version;
        }
        Ok(())
    }

    /// Takes everything of another state, made from other events.
    pub fn merge(&mut self, other: Settings) {
        self.fields.merge(&other.fields);
        self.named.extend(other.named);
        self.heads.extend(other.heads);
        self.heads.retain(|id, _| !self.named.contains(id));
        for (device, version) in other.documents {
            let have = self.documents.entry(device).or_insert(version);
            if version.replaces(have) {
                *have = version;
            }
        }
    }

    /// What all versions amount to.
    pub fn fields(&self) -> &Fields {
        &self.fields
    }

    /// The versions that no other names.
    pub fn heads(&self) -> impl Iterator<Item = &EventId> {
        self.heads.keys()
    }

    /// The fields on which heads disagree; none when there is one head or all say the same.
    pub fn conflicts(&self) -> Vec<Conflict> {
        let conflict = |(name, winner): (&str, &Field)| {
            let mut others: Vec<Field> = Vec::new();
            for (_, fields) in self.heads.values() {
                let other = fields.field(name).filter(|field| *field != winner);
                others.extend(other.filter(|field| !others.contains(field)).cloned());
            }
            (!others.is_empty()).then(|| Conflict { name: name.to_owned(), winner: winner.clone(), others })
        };
        self.fields.iter().filter_map(conflict).collect()
    }

    /// Whether a merge is to be published: no head says all that is known. When one does, everybody falls silent.
    pub fn merge_due(&self) -> bool {
        !self.fields.is_empty() && !self.is_said_by_a_head(&self.fields)
    }

    fn is_said_by_a_head(&self, fields: &Fields) -> bool {
        self.heads.values().any(|(_, said)| said == fields)
    }

    /// What the app sees of a setting: state and drafts.
    pub fn view<'d>(&self, drafts: impl IntoIterator<Item = &'d Draft>) -> Fields {
        let changes = drafts.into_iter().filter(|draft| matches!(draft.op, Op::Settings { .. }));
        with_drafts(self.fields.clone(), &changes.collect::<Vec<_>>())
    }

    /// The command that writes a setting, once for each form: relays take one of them. Null removes.
    ///
    /// # Errors
    /// [`StaysHere`]: keep it on the device and publish nothing.
    pub fn set(name: &str, value: &Value, secrets_may_leave: bool) -> Result<[Op; 2], StaysHere> {
        match Class::of(name) {
            Class::Device => return Err(StaysHere::Device),
            Class::Secret if !secrets_may_leave => return Err(StaysHere::Secret),
            Class::Secret | Class::Sync => {}
        }
        let op = |form| Op::Settings { form, fields: BTreeMap::from([(name.to_owned(), value.clone())]) };
        Ok([op(SettingsForm::Slot), op(SettingsForm::Document)])
    }

    /// The event that says what is known and what these drafts add; nothing if that is said already.
    ///
    /// # Errors
    /// See [`SealError`].
    pub fn build(
        &self,
        form: SettingsForm,
        device: Device,
        drafts: &[&Draft],
        cipher: &dyn Cipher,
    ) -> Result<Option<Unsigned>, SealError> {
        let fields = with_drafts(self.fields.clone(), drafts);
        let latest = fields.latest().second();
        if fields.is_empty() || (form == SettingsForm::Slot && self.is_said_by_a_head(&fields)) {
            return Ok(None);
        }
        let body = Body { v: 1, dev: device.to_string(), f: fields };
        let plain = serde_json::to_string(&body).expect("fields can be written");
        let sealed = cipher::seal_for(cipher, &[], &plain)?;
        let (kind, created_at, mut tags) = match form {
            SettingsForm::Slot => self.slot_tags(latest),
            SettingsForm::Document => self.document_tags(latest, device),
        };
        tags.extend(Schema::Settings.tags());
        Ok(Some(Unsigned { kind, created_at, tags, content: sealed.content }))
    }

    fn slot_tags(&self, latest: u64) -> (crate::protocol::Kind, u64, Vec<Vec<String>>) {
        let mut heads: Vec<(u64, &EventId)> =
            self.heads.iter().map(|(id, (created_at, _))| (*created_at, id)).collect();
        heads.sort_by(|a, b| b.cmp(a));
        let newest = heads.first().map_or(0, |(created_at, _)| *created_at);
        let mut tags = vec![tag(["d", "settings"])];
        tags.extend(heads.iter().take(HEADS_MAX).map(|(_, id)| tag(["prev", &id.to_hex()])));
        (SETTINGS, latest.max(newest), tags)
    }

    fn document_tags(&self, latest: u64, device: Device) -> (crate::protocol::Kind, u64, Vec<Vec<String>>) {
        let before = self.documents.get(&device.to_string());
        let beyond = before.map_or(0, |version| version.created_at.saturating_add(1));
        (SETTINGS_DOCUMENT, latest.max(beyond), vec![tag(["d", &format!("{DOCUMENT_PREFIX}{device}")])])
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::protocol::Verified;
    use crate::sync::testing::{Desk, NOW_MS};

    fn set(name: &str, value: impl Into<Value>) -> Op {
        Settings::set(name, &value.into(), false).unwrap()[0].clone()
    }

    fn get<'d>(desk: &'d Desk, name: &str) -> Option<&'d Value> {
        desk.state.settings.fields().get(name)
    }

    /// Two devices write without knowing of each other: two heads, every field kept, one conflict; one device publishes
    /// the merge, and then nobody has anything to say.
    #[test]
    fn law_8_a_merge_ends_the_conflict() {
        let (mut a, mut b) = (Desk::new(1, 1), Desk::new(1, 2));
        let start = a.say(set("theme", "light"), NOW_MS);
        b.take(&start);
        let from_a = a.say(set("theme", "dark"), NOW_MS + 1_000);
        let from_b = b.say(set("size", 12), NOW_MS + 2_000);
        a.take(&from_b);
        b.take(&from_a);
        for desk in [&a, &b] {
            assert_eq!((get(desk, "theme"), get(desk, "size")), (Some(&json!("dark")), Some(&json!(12))));
            assert_eq!((desk.state.settings.heads().count(), desk.state.due([]).len()), (2, 1));
        }
        assert_eq!(a.state.settings.conflicts()[0].others[0].0, json!("light"));
        let merge = a.say(a.state.due([]).remove(0), NOW_MS + 3_000);
        assert_eq!(merge.tags.values("prev").count(), 2);
        b.take(&merge);
        for desk in [&a, &b] {
            assert!(desk.state.due([]).is_empty() && desk.state.settings.conflicts().is_empty());
            assert_eq!(desk.state.settings.heads().collect::<Vec<_>>(), [&merge.id]);
        }
    }

    /// Superseded versions may be forgotten (law 6), and the order of arrival plays no part (law 1).
    #[test]
    fn law_6_heads_say_everything() {
        let mut a = Desk::new(1, 1);
        let all: Vec<Verified<Event>> = (0..4).map(|n| a.say(set(&format!("k{n}"), n), NOW_MS + n)).collect();
        let (mut only_head, mut backwards) = (Desk::new(1, 2), Desk::new(1, 3));
        only_head.take(all.last().unwrap());
        backwards.take_all(all.iter().rev());
        for desk in [&only_head, &backwards] {
            assert_eq!(desk.state.settings.fields(), a.state.settings.fields());
            assert_eq!(desk.state.settings.heads().collect::<Vec<_>>(), [&all[3].id]);
            assert!(desk.state.due([]).is_empty());
        }
    }

    /// A removal is a write like any other; device settings never become a draft, secrets only when asked for.
    #[test]
    fn removals_and_classes() {
        let mut a = Desk::new(1, 1);
        a.say(set("theme", "dark"), NOW_MS);
        a.say(set("theme", Value::Null), NOW_MS);
        assert_eq!(get(&a, "theme"), None);
        assert!(a.state.settings.fields().field("theme").is_some());
        assert_eq!(Settings::set("device.dir", &json!("/x"), true), Err(StaysHere::Device));
        assert_eq!(Settings::set("secret.key", &json!("x"), false), Err(StaysHere::Secret));
        assert!(Settings::set("secret.key", &json!("x"), true).is_ok());
    }

    /// Relays without the slot get one document a device; both forms merge to the same.
    #[test]
    fn documents_merge_like_heads() {
        let (mut a, mut b) = (Desk::new(1, 1), Desk::new(1, 2));
        let document = |name: &str, value: i32| Settings::set(name, &json!(value), false).unwrap()[1].clone();
        let first = a.say(document("x", 1), NOW_MS);
        let second = a.say(document("x", 2), NOW_MS);
        assert!(second.created_at > first.created_at, "a relay keeps the later one");
        assert_eq!(second.tags.values("d").next(), Some("oa:settings:0000000000000001"));
        let other = b.say(document("y", 3), NOW_MS);
        b.take_all([&second, &first]);
        assert_eq!((get(&b, "x"), get(&b, "y")), (Some(&json!(2)), Some(&json!(3))));
        // Nobody has said it in the slot.
        assert_eq!(b.state.due([]).len(), 1);
        a.take(&other);
        assert_eq!(a.state.settings.fields(), b.state.settings.fields());
    }

    /// What waits in the outbox is seen at once and told by one event.
    #[test]
    fn drafts_are_told_together() {
        let mut a = Desk::new(1, 1);
        let drafts: Vec<Draft> = (0..3).map(|n| a.draft(set("x", n), NOW_MS + n)).collect();
        assert_eq!(a.state.settings.view(&drafts).get("x"), Some(&json!(2)));
        assert!(a.state.due(&drafts).is_empty());
        let event = a.build(&drafts.iter().collect::<Vec<_>>()).unwrap();
        a.take(&event);
        assert_eq!(get(&a, "x"), Some(&json!(2)));
        assert!(a.build(&drafts.iter().collect::<Vec<_>>()).is_none(), "it is said already");
    }

    /// Somebody else's settings, stamps beyond `created_at` and unknown versions are refused.
    #[test]
    fn law_7_invalid_settings() {
        let (mut a, mut other) = (Desk::new(1, 1), Desk::new(2, 2));
        let draft = Desk::draft_at(set("x", 1), Hlc::at(NOW_MS, Device(1)));
        let mut unsigned = a.state.build(&[&draft], Device(1), &a.cipher).unwrap().unwrap();
        let good = a.sign(&unsigned);
        assert_eq!(other.take(&good), crate::sync::Absorbed::Invalid("somebody else's settings"));
        unsigned.created_at -= 1;
        let early = a.sign(&unsigned);
        assert_eq!(a.take(&early), crate::sync::Absorbed::Invalid("a stamp lies after the event's created_at"));
    }
}
