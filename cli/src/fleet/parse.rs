//! Parses the text of a fleet file into the VMs that it describes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use kvm_ops::{Kind, MAX_VCPUS, Tech};
use kvm_ops_machine::ImageFormat;
use toml::de::{DeTable, DeValue};

use crate::args::HostChoice;
use crate::exit_code::Code;
use crate::failure::Failure;
use crate::guests;
use crate::units;

use super::expect::{Expect, WantedEnd};
use super::problem::{At, Problem, Problems};
use super::source::Source;
use super::spec::{VmSpec, Work, copies};
use super::table::Table;

/// The maximum number of VMs in a fleet. Each needs a thread and file descriptors.
pub(crate) const MAX_VMS: u64 = 4096;

/// The default timeout of a guest.
pub(crate) const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

/// The default memory of a VM with an image, in bytes.
const DEFAULT_MEMORY: u64 = 64 << 20;

const FLEET_KEYS: &[&str] = &["defaults", "vm"];
const DEFAULTS_KEYS: &[&str] = &["kind", "host", "vcpus", "memory", "timeout"];
const VM_KEYS: &[&str] = &[
    "name",
    "count",
    "kind",
    "host",
    "vcpus",
    "memory",
    "payload",
    "image",
    "format",
    "irqchip",
    "kernel",
    "allow_rbp",
    "cmdline",
    "initrd",
    "timeout",
    "expect",
    "optional",
];
const EXPECT_KEYS: &[&str] = &["end", "console", "result"];

/// Parses a whole fleet file, and collects all its problems.
pub(crate) fn parse(source: &Source, host: HostChoice) -> Result<Vec<VmSpec>, Failure> {
    let problems = Problems::default();
    let (root, syntax) = DeTable::parse_recoverable(&source.text);
    for error in &syntax {
        let span = error.span().unwrap_or(0..0);
        problems.add(Problem::new("this is not TOML").at(&span, error.message()));
    }
    // Parse no further: after a syntax error, more problems would be spurious.
    problems.check(source)?;

    let root = Table::new("a fleet file", root.span(), root.get_ref(), &problems);
    root.only(FLEET_KEYS);
    let mut reader = Reader {
        source,
        problems: &problems,
        defaults: Defaults::new(host),
        names: RefCell::default(),
    };
    if let Some(table) = root.table("defaults", "[defaults]") {
        table.only(DEFAULTS_KEYS);
        reader.defaults = reader.shared(&table);
    }
    let tables = root.tables("vm", "[[vm]]");
    let vms: Vec<_> = tables
        .iter()
        .flatten()
        .filter_map(|table| reader.vm(table))
        .collect();
    if tables
        .as_ref()
        .map_or(root.get("vm").is_none(), Vec::is_empty)
    {
        problems.add(
            Problem::new("the fleet has no VMs")
                .hint("add one: [[vm]] with name = \"first\" and payload = \"hello\""),
        );
    }
    reader.check_total();
    problems.check(source)?;
    Ok(vms)
}

/// The keys that `[defaults]` and `[[vm]]` have in common.
#[derive(Clone)]
struct Defaults {
    kind: Option<At<Kind>>,
    host: HostChoice,
    vcpus: Option<At<u64>>,
    memory: Option<At<u64>>,
    timeout: Duration,
}

impl Defaults {
    const fn new(host: HostChoice) -> Self {
        Self {
            kind: None,
            host,
            vcpus: None,
            memory: None,
            timeout: DEFAULT_TIMEOUT,
        }
    }
}

struct Reader<'a> {
    source: &'a Source,
    problems: &'a Problems,
    defaults: Defaults,
    /// The names of all VMs so far, with their places in the file.
    names: RefCell<HashMap<String, Range<usize>>>,
}

impl Reader<'_> {
    fn shared(&self, table: &Table<'_, '_>) -> Defaults {
        let kinds: Vec<_> = ["normal"]
            .into_iter()
            .chain(Tech::ALL.iter().map(|tech| tech.name()))
            .collect();
        let hosts = HostChoice::ALL.map(HostChoice::name);
        let defaults = self.defaults.clone();
        Defaults {
            kind: table
                .choice("kind", &kinds, Kind::from_name)
                .or(defaults.kind),
            host: table
                .choice("host", &hosts, |name| {
                    HostChoice::ALL.into_iter().find(|host| host.name() == name)
                })
                .map_or(defaults.host, |at| at.value),
            vcpus: table
                .integer("vcpus", 1..=MAX_VCPUS.into())
                .or(defaults.vcpus),
            memory: self.memory(table).or(defaults.memory),
            timeout: table
                .parsed("timeout", units::parse_time)
                .map_or(defaults.timeout, |at| at.value),
        }
    }

    /// Reads memory: a string with a unit, or a number of bytes.
    fn memory(&self, table: &Table<'_, '_>) -> Option<At<u64>> {
        if !matches!(table.get("memory")?.get_ref(), DeValue::Integer(_)) {
            return table.parsed("memory", units::parse_memory);
        }
        let memory = table.integer("memory", 0..=u64::MAX)?;
        if let Err(why) = units::check_memory(memory.value) {
            self.problems
                .add(Problem::new("`memory` is not acceptable").at(&memory.span, why));
            return None;
        }
        Some(memory)
    }

    fn vm(&self, table: &Table<'_, '_>) -> Option<VmSpec> {
        table.only(VM_KEYS);
        let name = self.name(table);
        let shared = self.shared(table);
        let count = table.integer("count", 1..=MAX_VMS).map_or(1, |at| at.value);
        let optional = table.flag("optional").unwrap_or(false);
        let work = self.work(table);
        let mut expect = match &work {
            Some(Work::BuiltIn(guest)) => guest.expect(),
            _ => Expect::default(),
        };
        self.expect(table, &mut expect);
        let name = name?;
        // Checked even if the rest is wrong, so that all problems are reported at once.
        self.check_name(&name, count as u32);
        let work = work?;
        let (vcpus, memory) = self.size(&work, &shared, table)?;
        Some(VmSpec {
            name,
            count: count as u32,
            kind: shared.kind.unwrap_or(At {
                value: Kind::Normal,
                span: table.span.clone(),
            }),
            host: shared.host,
            vcpus,
            memory,
            work,
            timeout: shared.timeout,
            expect,
            optional,
            span: table.span.clone(),
        })
    }

    fn name(&self, table: &Table<'_, '_>) -> Option<At<String>> {
        if table.get("name").is_none() {
            self.problems
                .add(Problem::new("a VM without a name").at(&table.span, "needs `name`"));
            return None;
        }
        table.parsed("name", |name| {
            let good = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if name.is_empty() || name.len() > 40 || !name.chars().all(good) {
                return Err("1 to 40 letters, digits and -_. make a name".into());
            }
            Ok(name.to_owned())
        })
    }

    fn work(&self, table: &Table<'_, '_>) -> Option<Work> {
        let (payload, image) = (table.get("payload"), table.get("image"));
        match (payload, image) {
            (Some(payload), Some(image)) => {
                self.problems.add(
                    Problem::new("a VM runs one thing")
                        .at(&image.span(), "an image")
                        .and(&payload.span(), "and a built-in payload"),
                );
                None
            }
            (None, None) => {
                self.problems.add(
                    Problem::new("a VM with nothing to run")
                        .at(&table.span, "needs `payload` or `image`")
                        .hint(format!("built-in payloads: {}", guests::names().join(", "))),
                );
                None
            }
            (Some(_), None) => {
                for key in [
                    "format",
                    "irqchip",
                    "kernel",
                    "allow_rbp",
                    "cmdline",
                    "initrd",
                ] {
                    if let Some(value) = table.get(key) {
                        self.problems.add(
                            Problem::new(format!("`{key}` goes with an image"))
                                .at(&value.span(), "this VM runs a built-in payload"),
                        );
                    }
                }
                let guest = table.choice("payload", &guests::names(), guests::find)?;
                Some(Work::BuiltIn(guest.value))
            }
            (None, Some(_)) => {
                let formats = ImageFormat::ALL.map(ImageFormat::name);
                Some(Work::Image {
                    path: self.file(table, "image")?,
                    format: table
                        .choice("format", &formats, ImageFormat::from_name)
                        .map(|at| at.value),
                    irqchip: table
                        .choice(
                            "irqchip",
                            &units::IRQCHIPS.map(|(name, _)| name),
                            units::irqchip,
                        )
                        .map(|at| at.value),
                    kernel: self.file(table, "kernel"),
                    allow_rbp: table.flag("allow_rbp").unwrap_or(false),
                    cmdline: table.string("cmdline").map(|at| at.value),
                    initrd: self.file(table, "initrd"),
                })
            }
        }
    }

    /// Reads the path of an existing file, relative to the fleet file's directory.
    fn file(&self, table: &Table<'_, '_>, key: &str) -> Option<At<PathBuf>> {
        let At { value, span } = table.string(key)?;
        let path = self.source.base.join(value);
        let why = match std::fs::metadata(&path) {
            Ok(meta) if meta.is_file() => return Some(At { value: path, span }),
            Ok(_) => "not a regular file".to_owned(),
            Err(error) => error.to_string(),
        };
        self.problems.add(
            Problem::new(format!("cannot use {key} {}", path.display()))
                .at(&span, why)
                .code(Code::Input)
                .hint("a relative path leads from the directory of the fleet file"),
        );
        None
    }

    /// Returns vCPUs and memory, from the file or from the payload.
    fn size(&self, work: &Work, shared: &Defaults, table: &Table<'_, '_>) -> Option<(u32, u64)> {
        let Work::BuiltIn(guest) = work else {
            let memory = shared.memory.as_ref().map_or(DEFAULT_MEMORY, |at| at.value);
            return Some((
                shared.vcpus.as_ref().map_or(1, |at| at.value as u32),
                memory,
            ));
        };
        // A default that does not fit a payload is ignored; only the VM's own values are checked.
        let own = |key, at: &Option<At<u64>>| at.clone().filter(|_| table.get(key).is_some());
        if let Some(at) =
            own("vcpus", &shared.vcpus).filter(|at| at.value != u64::from(guest.vcpus))
        {
            self.problems.add(
                Problem::new(format!("`vcpus` does not fit payload `{}`", guest.name))
                    .at(&at.span, format!("must be {}, or left out", guest.vcpus)),
            );
            return None;
        }
        let least = guest.memory;
        if let Some(at) = own("memory", &shared.memory).filter(|at| at.value < least) {
            self.problems.add(
                Problem::new(format!("too little memory for payload `{}`", guest.name))
                    .at(&at.span, format!("must be {} or more", units::size(least))),
            );
            return None;
        }
        let memory = shared
            .memory
            .as_ref()
            .map_or(least, |at| at.value.max(least));
        Some((guest.vcpus, memory))
    }

    fn expect(&self, table: &Table<'_, '_>, expect: &mut Expect) {
        let Some(table) = table.table("expect", "`expect`") else {
            return;
        };
        table.only(EXPECT_KEYS);
        let ends = WantedEnd::ALL.map(WantedEnd::name);
        if let Some(end) = table.choice("end", &ends, WantedEnd::from_name) {
            expect.end = end.value;
            if end.value == WantedEnd::Console && table.get("console").is_none() {
                self.problems.add(
                    Problem::new("an end without its text")
                        .at(&end.span, "needs `console` beside it"),
                );
            }
        }
        if let Some(console) = table.string("console") {
            expect.console = Some(console.value);
        }
        if let Some(result) = table.integer("result", 0..=u32::MAX.into()) {
            expect.result = Some(result.value as u32);
        }
    }

    /// Checks that names are unique, including those with numbers.
    fn check_name(&self, name: &At<String>, count: u32) {
        let mut names = self.names.borrow_mut();
        for copy in copies(&name.value, count) {
            if let Some(first) = names.get(&copy) {
                self.problems.add(
                    Problem::new(format!("two VMs of the name `{copy}`"))
                        .at(&name.span, "used again")
                        .and(first, "used here"),
                );
                return;
            }
            names.insert(copy, name.span.clone());
        }
    }

    fn check_total(&self) {
        let total = self.names.borrow().len();
        if total as u64 > MAX_VMS {
            self.problems.add(
                Problem::new(format!("{total} VMs are too many"))
                    .hint(format!("a fleet has {MAX_VMS} at most")),
            );
        }
    }
}
