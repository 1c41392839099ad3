//! Line 1 of a transcript.

use super::Options;
use super::json::{Object, Parsed, array, narrow, number, numbers};
use crate::builder::PlatformBuilder;
use crate::config::{CpuidConfig, NativeCpuid, PlatformConfig, Range, Tdmr};
use crate::platform::Platform;
use serde_json::Value;

/// Properties of the module that this one fixes; a transcript of another is not comparable.
const FIXED: [(&str, u64); 13] = [
    ("pa_bits", 52),
    ("tdcs_base_pages", 6),
    ("tdcs_pages_per_l2_vm", 1),
    ("tdcs_max_pages", 9),
    ("tdvps_base_pages", 6),
    ("tdvps_pages_per_l2_vm", 3),
    ("tdvps_max_pages", 15),
    ("max_l2_vms", 3),
    ("max_tdmrs", 64),
    ("max_reserved_per_tdmr", 16),
    ("pamt_entry_size", 16),
    ("config_flags_fixed1", 0),
    ("attributes_fixed1", 0),
];

fn range(v: Value) -> Parsed<Range> {
    match numbers(array(v)?)?.as_slice() {
        [base, size] => Ok(Range::new(*base, *size)),
        _ => Err("a range is not a pair".into()),
    }
}

fn ranges(values: Vec<Value>) -> Parsed<Vec<Range>> {
    values.into_iter().map(range).collect()
}

fn tdmr(v: Value) -> Parsed<Tdmr> {
    let mut o = Object::from_value(v)?;
    let tdmr = Tdmr {
        range: Range::new(o.number("base")?, o.number("size")?),
        pamt_1g: range(o.need("pamt_1g")?)?,
        pamt_2m: range(o.need("pamt_2m")?)?,
        pamt_4k: range(o.need("pamt_4k")?)?,
        reserved: ranges(o.array("reserved")?)?,
    };
    o.done()?;
    Ok(tdmr)
}

fn cpuid_config(v: Value) -> Parsed<CpuidConfig> {
    let row = numbers(array(v)?)?;
    let [leaf, subleaf, rank, a, b, c, d] = row.as_slice() else {
        return Err("a cpuid row does not have seven numbers".into());
    };
    let permitted = [narrow(*a)?, narrow(*b)?, narrow(*c)?, narrow(*d)?];
    Ok(CpuidConfig {
        leaf: narrow(*leaf)?,
        subleaf: narrow(*subleaf)?,
        rank: narrow(*rank)?,
        permitted,
    })
}

/// Builds the machine, and brings it up if the transcript starts so.
pub(super) fn build(line: &[u8], options: Options) -> Parsed<Platform> {
    let mut o = Object::parse(line)?;
    if o.string("kind")? != "platform" {
        return Err("the first line is not a platform".into());
    }
    for (key, value) in FIXED {
        if o.number(key)? != value {
            return Err(format!("{key} is not {value}"));
        }
    }
    let format = o.number("format")?;
    if !(1..=2).contains(&format) {
        return Err(format!("format {format} is not known"));
    }
    for name in ["module", "name", "transcript"] {
        o.take(name);
    }
    let lps: usize = narrow(o.number("lps")?)?;
    let packages: usize = narrow(o.number("packages")?)?;
    let lp_package: Vec<usize> = numbers(o.array("lp_package")?)?
        .into_iter()
        .map(narrow)
        .collect::<Parsed<_>>()?;
    if lp_package.len() != lps {
        return Err("lp_package does not have an entry for each processor".into());
    }
    let pair = |v: Vec<Value>| -> Parsed<(u16, u16)> {
        match numbers(v)?.as_slice() {
            [a, b] => Ok((narrow(*a)?, narrow(*b)?)),
            _ => Err("not a pair".into()),
        }
    };
    let start = o.string("start")?;
    let keyids = (
        narrow(o.number("keyid_bits")?)?,
        pair(o.array("private_hkids")?)?,
    );
    let builder = PlatformBuilder::new()
        .processors(lp_package)
        .keyids(keyids.0, keyids.1, narrow(o.number("global_hkid")?)?)
        .memory(o.number("memory_bytes")?)
        .seamrr(range(o.need("seamrr")?)?)
        .cmrs(ranges(o.array("cmrs")?)?)
        .tdmrs(
            o.array("tdmrs")?
                .into_iter()
                .map(tdmr)
                .collect::<Parsed<Vec<_>>>()?,
        )
        .cache_wb_blocks(narrow(o.number("cache_wb_blocks")?)?)
        .encrypt_memory(options.encrypt_memory)
        // The recorded machine has no SEAMREPORT: what that instruction fills in is zero there.
        .seal_reports(false)
        .escrow_keys(true)
        .seed(0);
    let mut failed = Ok(());
    let builder = builder.with(|c| {
        c.packages = packages;
        failed = constants(c, &mut o);
        if format == 2 && failed.is_ok() {
            failed = native(c, &mut o);
        }
    });
    failed?;
    o.done()?;
    let platform = builder.build().map_err(|e| e.to_string())?;
    match start.as_str() {
        "ready" => platform.bring_up().map_err(|e| e.to_string())?,
        "cold" => {}
        other => return Err(format!("unknown start {other}")),
    }
    Ok(platform)
}

/// The keys of format 2: random numbers and the native CPU.
fn native(c: &mut PlatformConfig, o: &mut Object) -> Parsed<()> {
    c.build_date = 20_240_101;
    c.rng_seed = Some(o.number("rng_seed")?);
    c.cpuid = o
        .array("cpuid")?
        .into_iter()
        .map(native_cpuid)
        .collect::<Parsed<_>>()?;
    c.msrs = o
        .array("msrs")?
        .into_iter()
        .map(|v| match numbers(array(v)?)?.as_slice() {
            [address, value] => Ok((narrow(*address)?, *value)),
            _ => Err("an msr row is not a pair".into()),
        })
        .collect::<Parsed<_>>()?;
    Ok(())
}

fn native_cpuid(v: Value) -> Parsed<NativeCpuid> {
    let row = numbers(array(v)?)?;
    let [leaf, subleaf, a, b, c, d] = row.as_slice() else {
        return Err("a native cpuid row does not have six numbers".into());
    };
    Ok(NativeCpuid {
        leaf: narrow(*leaf)?,
        subleaf: narrow(*subleaf)?,
        values: [narrow(*a)?, narrow(*b)?, narrow(*c)?, narrow(*d)?],
    })
}

fn constants(c: &mut PlatformConfig, o: &mut Object) -> Parsed<()> {
    c.fms = narrow(o.number("fms")?)?;
    c.tsc_hz = o.number("tsc_hz")?;
    c.max_vcpus = narrow(o.number("max_vcpus")?)?;
    c.attributes_fixed0 = o.number("attributes_fixed0")?;
    c.xfam_fixed0 = o.number("xfam_fixed0")?;
    c.xfam_fixed1 = o.number("xfam_fixed1")?;
    c.config_flags_fixed0 = o.number("config_flags_fixed0")?;
    let frequencies = o.array("tsc_frequency")?;
    let frequency = |i: usize| -> Parsed<u16> {
        narrow(number(
            frequencies.get(i).ok_or("tsc_frequency is not a pair")?,
        )?)
    };
    c.tsc_frequency = (frequency(0)?, frequency(1)?);
    c.arch_capabilities_config_mask = o.number("arch_capabilities_config_mask")?;
    c.rdseed_tries = narrow(o.number("rdseed_tries")?)?;
    c.cpuid_configs = o
        .array("cpuid_configs")?
        .into_iter()
        .map(cpuid_config)
        .collect::<Parsed<_>>()?;
    Ok(())
}
