//! Lines that look at the module's state.

use super::event::page_size;
use super::json::{Object, Parsed, narrow, number, numbers};
use super::replay::{Failure, MAX_LEN, Played, same};
use crate::pamt::PageType;
use crate::platform::Platform;
use sha2::{Digest, Sha384};

fn opt_number(o: &mut Object, key: &str) -> Parsed<Option<u64>> {
    o.take(key).map(|v| number(&v)).transpose()
}

fn gone(what: &str) -> Failure {
    Failure::Differs {
        expected: format!("a {what}"),
        got: "none".into(),
    }
}

pub(super) fn check(p: &Platform, mut o: Object) -> Played {
    let what = o.string("what")?;
    match what.as_str() {
        "sys" => same(
            "state",
            &o.string("state")?,
            &p.sys_state().name().to_owned(),
        )?,
        "kot" => kot(p, &mut o)?,
        "pamt" => pamt(p, &mut o)?,
        "tdr" => tdr(p, &mut o)?,
        "tdcs" => tdcs(p, &mut o)?,
        "tdvps" => tdvps(p, &mut o)?,
        "mig" => mig(p, &mut o)?,
        "sept" => sept(p, &mut o)?,
        "mrtd" | "rtmr" => {
            let td = p.td(o.number("tdr")?).ok_or_else(|| gone("td"))?;
            let value = if what == "mrtd" {
                td.mrtd
            } else {
                let index: usize = narrow(o.number("index")?)?;
                *td.rtmr
                    .get(index)
                    .ok_or_else(|| gone("register of that index"))?
            };
            same(&what, &o.string("value")?, &hex::encode(value))?;
        }
        "mem" => mem(p, &mut o)?,
        other => return Err(format!("unknown check {other}").into()),
    }
    Ok(o.done()?)
}

fn kot(p: &Platform, o: &mut Object) -> Played {
    let row = p
        .hkid(narrow(o.number("hkid")?)?)
        .ok_or_else(|| gone("private key id"))?;
    same("state", &o.string("state")?, &row.state.name().to_owned())?;
    same(
        "wbinvd_bitmap",
        &o.number("wbinvd_bitmap")?,
        &row.wbinvd_bitmap,
    )
}

fn pamt(p: &Platform, o: &mut Object) -> Played {
    let pa = o.number("pa")?;
    let view = p.page(pa, page_size(o.number("level")?)?);
    let expected = o.string("type")?;
    let owner = opt_number(o, "owner")?;
    let bepoch = opt_number(o, "bepoch")?;
    let Some(view) = view else {
        return same("type", &expected, &"NONE".to_owned());
    };
    same("type", &expected, &view.page_type.name().to_owned())?;
    if let Some(owner) = owner {
        same("owner", &owner, &view.owner)?;
    }
    match bepoch {
        Some(b) if matches!(view.page_type, PageType::Reg | PageType::Ept) => {
            same("bepoch", &b, &view.bepoch)
        }
        _ => Ok(()),
    }
}

fn tdr(p: &Platform, o: &mut Object) -> Played {
    let td = p.td(o.number("pa")?).ok_or_else(|| gone("td"))?;
    same("fatal", &o.number("fatal")?, &u64::from(td.fatal))?;
    same("num_tdcx", &o.number("num_tdcx")?, &u64::from(td.num_tdcx))?;
    same("chldcnt", &o.number("chldcnt")?, &td.chldcnt)?;
    same(
        "lifecycle",
        &o.string("lifecycle")?,
        &td.lifecycle.name().to_owned(),
    )?;
    same("hkid", &o.number("hkid")?, &u64::from(td.hkid))?;
    same("pkg_bitmap", &o.number("pkg_bitmap")?, &td.pkg_bitmap)
}

fn tdcs(p: &Platform, o: &mut Object) -> Played {
    let td = p.td(o.number("tdr")?).ok_or_else(|| gone("td"))?;
    same(
        "op_state",
        &o.string("op_state")?,
        &td.op_state.name().to_owned(),
    )?;
    same(
        "num_vcpus",
        &o.number("num_vcpus")?,
        &u64::from(td.num_vcpus),
    )?;
    same(
        "num_assoc",
        &o.number("num_assoc")?,
        &u64::from(td.num_assoc),
    )?;
    same("epoch", &o.number("epoch")?, &td.epoch)?;
    same(
        "refcount",
        &numbers(o.array("refcount")?)?,
        &td.refcount.to_vec(),
    )
}

fn mig(p: &Platform, o: &mut Object) -> Played {
    let m = p.migration(o.number("tdr")?).ok_or_else(|| gone("td"))?;
    for (key, got) in [
        ("export_count", m.export_count.into()),
        ("import_count", m.import_count.into()),
        ("mig_epoch", m.mig_epoch.into()),
        ("bw_epoch", m.bw_epoch),
        ("total_mb_count", m.total_mb_count),
        ("dirty_count", m.dirty_count),
        ("mig_count", m.mig_count),
        ("num_migs", m.num_migs.into()),
        ("num_migrated_vcpus", m.num_migrated_vcpus.into()),
        ("dec_key_set", m.dec_key_set.into()),
        ("mig_version", m.version.into()),
        ("working_version", m.working_version.into()),
    ] {
        same(key, &o.number(key)?, &got)?;
    }
    Ok(())
}

/// The recorder looks at a page that is no TDVPR, too, and finds zeros.
fn no_tdvps(o: &mut Object) -> Played {
    same("state", &o.string("state")?, &"UNINITIALIZED".to_owned())?;
    same("pages", &o.number("pages")?, &0)?;
    same("assoc_lp", &o.number("assoc_lp")?, &0)
}

fn tdvps(p: &Platform, o: &mut Object) -> Played {
    let Some(vcpu) = p.vcpu(o.number("pa")?) else {
        return no_tdvps(o);
    };
    same("state", &o.string("state")?, &vcpu.state.name().to_owned())?;
    same("pages", &o.number("pages")?, &u64::from(vcpu.pages))?;
    let lp = vcpu.assoc_lp.map_or(-1, |lp| lp as i64);
    same("assoc_lp", &(o.number("assoc_lp")? as i64), &lp)?;
    match opt_number(o, "index")? {
        Some(index) => same("index", &index, &u64::from(vcpu.index)),
        None => Ok(()),
    }
}

fn sept(p: &Platform, o: &mut Object) -> Played {
    let (tdr, gpa) = (o.number("tdr")?, o.number("gpa")?);
    let level = narrow(o.number("level")?)?;
    let view = p.sept(tdr, gpa, level).ok_or_else(|| gone("secure ept"))?;
    same(
        "found_level",
        &o.number("found_level")?,
        &u64::from(view.level),
    )?;
    same("state", &o.number("state")?, &(view.state as u64))?;
    same("entry", &o.number("entry")?, &view.entry)
}

fn mem(p: &Platform, o: &mut Object) -> Played {
    let (pa, len) = (o.number("pa")?, o.number("len")?);
    if len > MAX_LEN {
        return Err(format!("length {len:#x} is too large").into());
    }
    let mut bytes = vec![0; narrow(len)?];
    p.peek_memory(pa, &mut bytes).map_err(|e| e.to_string())?;
    match o.take("hex") {
        Some(hex) => same("memory", &hex, &hex::encode(&bytes).into()),
        None => same(
            "sha384",
            &o.string("sha384")?,
            &hex::encode(Sha384::digest(&bytes)),
        ),
    }
}
