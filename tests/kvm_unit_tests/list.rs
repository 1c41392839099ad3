//! The list of images, a line each:
//! `name,arch,image,vcpus,memory_mib,cpu,append,machine,timeout_s[,environment]`.
//!
//! `cpu` may hold commas; it then stands in quotation marks. A relative path of an image is relative to
//! the list. The architecture and the machine are for readers: the image tells the first, and the
//! machine is always the one of `machine.rs`. Lines that begin with `#` and empty ones are left out.

use std::path::{Path, PathBuf};
use std::time::Duration;

/// One run of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) image: PathBuf,
    pub(crate) vcpus: u32,
    pub(crate) memory: u64,
    pub(crate) cpu: String,
    /// The arguments of the command line.
    pub(crate) append: String,
    pub(crate) timeout: Duration,
    /// `NAME=value` words, which the image finds in a multiboot module.
    pub(crate) environment: String,
}

/// Splits a line at the commas outside of quotation marks.
fn fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            c => fields.last_mut().expect("never empty").push(c),
        }
    }
    fields
}

fn entry(line: &str, base: &Path) -> Result<Entry, String> {
    let fields = fields(line);
    let field = |n: usize| fields.get(n).map_or("", |field| field.trim());
    let number = |n: usize| {
        let text = field(n);
        let parsed = text.parse::<u64>();
        parsed.map_err(|_| format!("{text:?} is no number in {line:?}"))
    };
    if !(9..=10).contains(&fields.len()) {
        return Err(format!("{} fields, not 9 or 10: {line:?}", fields.len()));
    }
    let vcpus = number(3)?;
    Ok(Entry {
        name: field(0).to_owned(),
        image: base.join(field(2)),
        vcpus: u32::try_from(vcpus).map_err(|_| format!("{vcpus} vCPUs in {line:?}"))?,
        memory: number(4)? << 20,
        cpu: field(5).to_owned(),
        append: field(6).to_owned(),
        timeout: Duration::from_secs(number(8)?),
        environment: field(9).to_owned(),
    })
}

/// Reads a list that lies in the directory `base`.
pub(crate) fn parse(text: &str, base: &Path) -> Result<Vec<Entry>, String> {
    let lines = text.lines().map(str::trim);
    let lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    // A heading is not an entry.
    let lines = lines.filter(|line| !line.starts_with("name,"));
    lines.map(|line| entry(line, base)).collect()
}

#[test]
fn a_line_of_the_list_is_an_entry() {
    let text = "name,arch,image,vcpus,memory_mib,cpu,append,machine,timeout_s\n\
        # apic\n\n\
        x2apic,x86_64,x86/apic.flat,2,128,\"qemu64,+x2apic\",a b,pc,30,TEST_DEVICE=0\n";
    let expected = Entry {
        name: "x2apic".into(),
        image: "/list/x86/apic.flat".into(),
        vcpus: 2,
        memory: 128 << 20,
        cpu: "qemu64,+x2apic".into(),
        append: "a b".into(),
        timeout: Duration::from_secs(30),
        environment: "TEST_DEVICE=0".into(),
    };
    assert_eq!(parse(text, Path::new("/list")), Ok(vec![expected]));
    for bad in [
        "a,b,c",
        "n,x86_64,i,two,128,max,,pc,30",
        "n,x86_64,i,1,,max,,pc,30",
    ] {
        assert!(parse(bad, Path::new("/")).is_err(), "{bad}");
    }
}
