//! CPUID for a processor model, as the list names it: `model[,+feature][,-feature][,vendor=...]`.
//!
//! `max` and `host` have all that the software platform's processor has. Another model has the features of
//! [`SMALL`] that it has at all, so that an image meets MSRs and bits of CR4 that do not exist.

use kvm_ops::{CpuidEntry, Vendor};
use kvm_ops_cpu::{CpuidLeaf, CpuidTable};

/// A feature: its name in lists, its leaf, the register (0 is EAX) and the bit.
type Feature = (&'static str, u32, usize, u32);

const FEATURES: [Feature; 31] = [
    ("sse3", 1, 2, 0),
    ("pclmulqdq", 1, 2, 1),
    ("ssse3", 1, 2, 9),
    ("cx16", 1, 2, 13),
    ("pcid", 1, 2, 17),
    ("sse4.1", 1, 2, 19),
    ("sse4.2", 1, 2, 20),
    ("x2apic", 1, 2, 21),
    ("movbe", 1, 2, 22),
    ("popcnt", 1, 2, 23),
    ("tsc-deadline", 1, 2, 24),
    ("aes", 1, 2, 25),
    ("xsave", 1, 2, 26),
    ("avx", 1, 2, 28),
    ("f16c", 1, 2, 29),
    ("rdrand", 1, 2, 30),
    ("fsgsbase", 7, 1, 0),
    ("tsc_adjust", 7, 1, 1),
    ("smep", 7, 1, 7),
    ("erms", 7, 1, 9),
    ("invpcid", 7, 1, 10),
    ("rdseed", 7, 1, 18),
    ("smap", 7, 1, 20),
    ("umip", 7, 2, 2),
    ("pku", 7, 2, 3),
    ("la57", 7, 2, 16),
    ("rdpid", 7, 2, 22),
    ("pks", 7, 2, 31),
    ("lahf_lm", 0x8000_0001, 2, 0),
    ("abm", 0x8000_0001, 2, 5),
    ("rdtscp", 0x8000_0001, 3, 27),
];

/// The features of the models that are not `max` or `host`.
const SMALL: [(&str, &[&str]); 3] = [
    ("qemu64", &["sse3", "cx16", "lahf_lm"]),
    ("Opteron_G1", &["sse3"]),
    (
        "IvyBridge",
        &[
            "sse3",
            "pclmulqdq",
            "ssse3",
            "cx16",
            "sse4.1",
            "sse4.2",
            "x2apic",
            "popcnt",
            "tsc-deadline",
            "aes",
            "xsave",
            "avx",
            "f16c",
            "rdrand",
            "fsgsbase",
            "smep",
            "erms",
            "lahf_lm",
            "rdtscp",
        ],
    ),
];

/// A model: what its vCPUs answer to CPUID.
pub(crate) struct Model {
    pub(crate) vendor: Vendor,
    table: CpuidTable,
    all: CpuidTable,
}

fn register(leaf: &mut CpuidLeaf, n: usize) -> &mut u32 {
    match n {
        0 => &mut leaf.eax,
        1 => &mut leaf.ebx,
        2 => &mut leaf.ecx,
        _ => &mut leaf.edx,
    }
}

impl Model {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let mut words = text.split(',').map(str::trim);
        let name = words.next().unwrap_or_default();
        let vendor = match text.contains("AuthenticAMD") {
            true => Vendor::Amd,
            false => Vendor::Intel,
        };
        let all = match vendor {
            Vendor::Amd => CpuidTable::amd(),
            _ => CpuidTable::intel(),
        };
        let mut model = Self {
            vendor,
            table: all.clone(),
            all,
        };
        if !matches!(name, "max" | "host") {
            let small = SMALL.iter().find(|(known, _)| *known == name);
            let (_, features) = small.ok_or_else(|| format!("no model {name:?}"))?;
            for feature in FEATURES {
                let has = features.contains(&feature.0) && model.has(feature);
                model.set(feature, has);
            }
            // Everything of leaf 7 that has no name here: BMI, ADX, SHA and others.
            let known = |register| {
                let named = FEATURES.iter().filter(move |f| f.1 == 7 && f.2 == register);
                named.fold(0, |mask, feature| mask | 1 << feature.3)
            };
            let mut leaf = model.table.get(7, 0);
            (leaf.ebx, leaf.ecx, leaf.edx) = (leaf.ebx & known(1), leaf.ecx & known(2), 0);
            model.table.set(7, 0, leaf);
        }
        words.try_for_each(|word| model.change(word))?;
        Ok(model)
    }

    fn has(&self, (_, leaf, at, bit): Feature) -> bool {
        *register(&mut self.all.get(leaf, 0), at) >> bit & 1 != 0
    }

    fn set(&mut self, (_, leaf, at, bit): Feature, on: bool) {
        let mut value = self.table.get(leaf, 0);
        let word = register(&mut value, at);
        *word = *word & !(1 << bit) | u32::from(on) << bit;
        self.table.set(leaf, 0, value);
    }

    fn change(&mut self, word: &str) -> Result<(), String> {
        if let Some(bits) = word.strip_prefix("phys-bits=") {
            let bits: u32 = bits.parse().map_err(|_| format!("{word:?}: no number"))?;
            let mut leaf = self.table.get(0x8000_0008, 0);
            leaf.eax = leaf.eax & !0xff | bits;
            self.table.set(0x8000_0008, 0, leaf);
            return Ok(());
        }
        if word.starts_with("vendor=") || word.starts_with("host-phys-bits") {
            // Looked at above; and the width is always that of the platform.
            return Ok(());
        }
        let feature = |name| FEATURES.into_iter().find(|feature| feature.0 == name);
        let (name, on) = match (word.strip_prefix('+'), word.strip_prefix('-')) {
            (Some(name), _) => (name, true),
            (_, Some(name)) => (name, false),
            _ => return Err(format!("{word:?} is neither +feature nor -feature")),
        };
        let feature = feature(name).ok_or_else(|| format!("no feature {name:?}"))?;
        if on && !self.has(feature) {
            return Err(format!("the processor has no {name}"));
        }
        self.set(feature, on);
        Ok(())
    }

    /// The answers as [`VcpuOps::set_cpuid`](kvm_ops::VcpuOps::set_cpuid) takes them.
    pub(crate) fn entries(&self) -> Vec<CpuidEntry> {
        let leaves = self.table.leaves();
        let entry = |(leaf, subleaf, value): (u32, u32, CpuidLeaf)| CpuidEntry {
            leaf,
            subleaf,
            subleaf_significant: self.table.leaves().any(|(l, s, _)| l == leaf && s != 0),
            regs: [value.eax, value.ebx, value.ecx, value.edx],
        };
        leaves.map(entry).collect()
    }
}

#[test]
fn a_model_has_what_its_words_say() {
    let pcid = |text| {
        let model = Model::parse(text).unwrap();
        let leaf = model.table.get(1, 0);
        (leaf.ecx >> 17 & 1, model.table.get(7, 0).ebx >> 10 & 1)
    };
    assert_eq!(pcid("max"), (1, 1));
    assert_eq!(pcid("qemu64"), (0, 0));
    assert_eq!(pcid("qemu64,-pcid,+invpcid"), (0, 1));
    assert_eq!(pcid("max,-invpcid,vendor=AuthenticAMD"), (1, 0));
    let model = Model::parse("IvyBridge,phys-bits=36,host-phys-bits=off").unwrap();
    assert_eq!(model.table.get(0x8000_0008, 0).eax as u8, 36);
    for bad in ["486", "max,+nothing", "max,pcid"] {
        assert!(Model::parse(bad).is_err(), "{bad}");
    }
}
