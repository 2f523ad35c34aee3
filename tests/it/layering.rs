//! Imports point down only: main -> cli -> server, client -> relay -> store, auth, sync -> protocol, config.
//!
//! `error` stands beside `cli` and is for it and `main`. Unit tests may reach anywhere.

use std::path::{Path, PathBuf};

/// Higher rooms may use lower ones; rooms of one height never use each other.
const HEIGHTS: [(&str, u32); 11] = [
    ("protocol", 0),
    ("config", 0),
    ("store", 1),
    ("auth", 1),
    ("sync", 1),
    ("relay", 2),
    ("server", 3),
    ("client", 3),
    ("error", 4),
    ("cli", 5),
    ("main", 6),
];

fn height(room: &str) -> Option<u32> {
    HEIGHTS.iter().find(|(name, _)| *name == room).map(|(_, height)| *height)
}

/// The room that a source file belongs to: its first folder, or its own name. `lib.rs` only names the rooms.
fn room_of(relative: &Path) -> Option<String> {
    let first = relative.components().next()?.as_os_str().to_str()?;
    let room = first.strip_suffix(".rs").unwrap_or(first);
    (room != "lib").then(|| room.to_owned())
}

/// What is left of a file when comments and everything from `#[cfg(test)]` on are taken away.
fn code_of(text: &str) -> String {
    let tests = text.find("#[cfg(test)]\nmod tests").unwrap_or(text.len());
    text[..tests].lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

/// The rooms that a piece of code names: after `crate::` or, in the binary, `sledge::`, also inside braces.
fn rooms_named(code: &str) -> Vec<String> {
    let mut rooms = Vec::new();
    for root in ["crate::", "sledge::"] {
        for (at, _) in code.match_indices(root) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '"') {
                continue;
            }
            let rest = &code[at + root.len()..];
            match rest.strip_prefix('{') {
                Some(group) => rooms.extend(heads_of_group(group)),
                None => rooms.push(identifier(rest)),
            }
        }
    }
    rooms
}

/// The first word of each item between braces, nested braces left out.
fn heads_of_group(group: &str) -> Vec<String> {
    let (mut depth, mut heads, mut expects) = (0, Vec::new(), true);
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => expects = true,
            _ if expects && (character.is_alphanumeric() || character == '_') => {
                heads.push(identifier(&group[at..]));
                expects = false;
            }
            _ => {}
        }
    }
    heads
}

fn identifier(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// Whether code of room `from` may name room `to`.
fn allowed(from: &str, to: &str) -> bool {
    match (height(from), height(to)) {
        _ if from == to => true,
        (Some(from), Some(to)) => to < from,
        // Not a room but an item of `lib.rs`, which has none; or a room that this table does not know.
        _ => false,
    }
}

fn source_files(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            source_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// No file of `src/` names a room at or above its own.
#[test]
fn imports_point_down() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    source_files(&src, &mut files);
    let (mut wrong, mut arrows) = (Vec::new(), 0);
    for file in files {
        let relative = file.strip_prefix(&src).unwrap();
        let Some(from) = room_of(relative) else { continue };
        assert!(height(&from).is_some(), "{} is in no room that this test knows", relative.display());
        for to in rooms_named(&code_of(&std::fs::read_to_string(&file).unwrap())) {
            arrows += 1;
            // A `crate::macro!` and the like would stand here too; there are none.
            if !allowed(&from, &to) {
                wrong.push(format!("{}: {from} -> {to}", relative.display()));
            }
        }
    }
    assert!(arrows > 30, "only {arrows} arrows found: the search is broken");
    assert!(wrong.is_empty(), "imports that point up or sideways:\n{}", wrong.join("\n"));
}

/// The search sees every form of import, and the rule knows up from down.
#[test]
fn the_search_finds_what_it_should() {
    let code = code_of(
        "use crate::relay::Relay; // crate::cli\nuse crate::{config::{A, B}, store};\nfn f() { crate::server::go() }\n\
         use sledge::cli; let x = \"crate::error\"; mycrate::auth();\n#[cfg(test)]\nmod tests { use crate::main; }",
    );
    assert_eq!(rooms_named(&code), ["relay", "config", "store", "server", "cli"]);
    for (from, to) in
        [("cli", "server"), ("server", "relay"), ("relay", "store"), ("store", "protocol"), ("main", "error")]
    {
        assert!(allowed(from, to) && !allowed(to, from), "{from} -> {to}");
    }
    for (from, to) in
        [("server", "client"), ("config", "protocol"), ("auth", "store"), ("relay", "error"), ("store", "error")]
    {
        assert!(!allowed(from, to), "{from} -> {to}");
    }
    assert!(allowed("store", "store"));
}
