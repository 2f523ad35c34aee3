//! `[memory]`: how much memory buffers and caches may take, and what this machine has.
//!
//! The machine is asked when a store is opened, not when settings are read: settings stay plain data.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::MIB;

/// The share of the machine's memory that an automatic budget takes: one part in so many. The id filter, the
/// connections, the engine's own bookkeeping and the system's file cache live beside it.
const MEMORY_PER_BUDGET: u64 = 4;
/// The least automatic budget, MiB.
pub(super) const BUDGET_MB_MIN: usize = 16;
/// The largest automatic budget, MiB: more speeds up only stores that are far larger than it.
const BUDGET_MB_AUTOMATIC_MAX: usize = 256;
/// Up to this budget, MiB, memory is worth more than a few percent of processor time.
const SMALL_BUDGET_MB: usize = 128;

/// `[memory]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// MiB that index buffers and caches aim at; 0 = by the machine, see [`Memory::budget_bytes`].
    pub budget_mb: usize,
}

impl Memory {
    /// Bytes that index buffers and caches aim at, on this machine.
    pub fn budget_bytes(&self) -> usize {
        self.budget_mb_on(machine_bytes()).saturating_mul(MIB)
    }

    /// Whether memory is scarce, so that it is worth more than a few percent of processor time.
    pub fn is_scarce(&self) -> bool {
        self.budget_mb_on(machine_bytes()) <= SMALL_BUDGET_MB
    }

    /// The budget on a machine with so much memory; `None`: it does not tell.
    fn budget_mb_on(&self, machine_bytes: Option<u64>) -> usize {
        match (self.budget_mb, machine_bytes) {
            (0, Some(bytes)) => {
                let share = usize::try_from(bytes / MEMORY_PER_BUDGET).unwrap_or(usize::MAX) / MIB;
                share.clamp(BUDGET_MB_MIN, BUDGET_MB_AUTOMATIC_MAX)
            }
            (0, None) => BUDGET_MB_AUTOMATIC_MAX,
            (budget_mb, _) => budget_mb,
        }
    }
}

/// Memory that this process may take in all: the machine's, or less where a control group limits it. `None` where the
/// system does not tell in the manner of Linux.
///
/// The kernel is asked too, since a service may not see `/proc/meminfo` (`ProcSubset=pid`); the file is, since inside a
/// container it may say less.
fn machine_bytes() -> Option<u64> {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let total = read(Path::new("/proc/meminfo")).and_then(|text| total_of(&text));
    let total = total.into_iter().chain(kernel_bytes());
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    let limits = limit_files(&groups).into_iter().filter_map(|file| read(&file)?.trim().parse().ok());
    total.chain(limits).min()
}

/// What the kernel says the machine has.
#[cfg(target_os = "linux")]
fn kernel_bytes() -> Option<u64> {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).checked_mul(info.mem_unit.into())
}

/// Other systems are not asked.
#[cfg(not(target_os = "linux"))]
fn kernel_bytes() -> Option<u64> {
    None
}

/// `MemTotal` of `/proc/meminfo`, in bytes.
fn total_of(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// The files that hold the limits on a process of these groups (`/proc/self/cgroup`, either version), those of the groups
/// around them included. In a container the root of what is mounted is the group itself.
fn limit_files(groups: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            list if list.split(',').any(|name| name == "memory") => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => continue,
        };
        for group in Path::new(path.trim_start_matches('/')).ancestors() {
            files.push(Path::new(root).join(group).join(file));
        }
    }
    files
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// A number of one's own stands; 0 takes a quarter of what the machine has, within bounds.
    #[test]
    fn the_budget_follows_the_machine() {
        let budget = |budget_mb, machine_mib: u64| Memory { budget_mb }.budget_mb_on(Some(machine_mib << 20));
        assert_eq!([256, 512, 1_000, 4_096, 1 << 20].map(|mib| budget(0, mib)), [64, 128, 250, 256, 256]);
        assert_eq!([1, 60, 100].map(|mib| budget(0, mib)), [16, 16, 25]);
        assert_eq!(budget(700, 256), 700);
        assert_eq!(Memory { budget_mb: 0 }.budget_mb_on(None), 256);
        assert!(Memory { budget_mb: 0 }.budget_bytes() >= 16 * MIB);
        assert!(Memory { budget_mb: 128 }.is_scarce() && !Memory { budget_mb: 129 }.is_scarce());
    }

    /// Both versions of control groups, the group itself and those around it; other controllers are passed over.
    #[test]
    fn limits_of_control_groups_are_found() {
        let files = |text: &str| {
            limit_files(text).into_iter().map(|file| file.to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(
            files("0::/user.slice/a.service\n"),
            [
                "/sys/fs/cgroup/user.slice/a.service/memory.max",
                "/sys/fs/cgroup/user.slice/memory.max",
                "/sys/fs/cgroup/memory.max"
            ]
        );
        assert_eq!(
            files("7:cpu,cpuacct:/x\n6:memory:/pi\n1:name=systemd:/\nnonsense\n"),
            ["/sys/fs/cgroup/memory/pi/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes"]
        );
        assert_eq!(total_of("MemTotal:         948412 kB\nMemFree: 1 kB\n"), Some(948_412 * 1024));
        assert_eq!(total_of("nothing of the kind"), None);
    }

    /// The kernel and its file agree about the machine; where there is no such file, the kernel's word is enough.
    #[cfg(target_os = "linux")]
    #[test]
    fn the_kernel_tells_what_the_file_tells() {
        let kernel = kernel_bytes().unwrap();
        let file = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| total_of(&text));
        assert!(kernel > 0 && file.is_none_or(|file| kernel.abs_diff(file) <= kernel / 2), "{kernel} and {file:?}");
    }
}
