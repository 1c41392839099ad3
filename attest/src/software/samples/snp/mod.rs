//! Reports of SNP guests.

mod bad;
mod making;

use super::super::parts::Result;
use super::Sample;
use crate::snp::{Expected, KeyKind, Product};
use bad::{BY_VLEK, Bad, GENOA, TURIN};
use making::{Authorities, Making};

/// The values that a verifier of the samples expects, but for those of Turin.
pub fn expected() -> Expected {
    making::expected(Product::Genoa)
}

/// The values that a verifier of this sample expects. Chip ids and TCB versions of Turin are others.
pub fn expected_of(sample: &Sample) -> Expected {
    making::expected(match sample.is_turin {
        true => Product::Turin,
        false => Product::Genoa,
    })
}

/// The chip of the samples, but for those of Turin.
pub fn chip() -> [u8; 64] {
    making::chip(Product::Genoa)
}

/// The samples: good ones of each product and key; bad ones of Genoa, with VCEK and VLEK, and of Turin.
pub fn reports() -> Result<Vec<Sample>> {
    let milan = Authorities::of(Product::Milan)?;
    let genoa = Authorities::of(Product::Genoa)?;
    let turin = Authorities::of(Product::Turin)?;
    let of = Making::new;
    let by_vlek = |product| Making::new(product).by_vlek();
    let mut samples = vec![
        good(
            "good-milan",
            "a good report of version 2",
            of(Product::Milan),
            &milan,
        )?,
        good(
            "good-genoa",
            "a good report of version 3",
            of(Product::Genoa),
            &genoa,
        )?,
        good(
            "good-turin",
            "a good report of version 5",
            of(Product::Turin),
            &turin,
        )?,
        good(
            "good-vlek",
            "a good report, signed by a VLEK",
            by_vlek(Product::Genoa),
            &genoa,
        )?,
    ];
    for bad in &GENOA {
        samples.push(wrong(bad, of(Product::Genoa), &genoa)?);
    }
    for bad in &BY_VLEK {
        samples.push(wrong(bad, by_vlek(Product::Genoa), &genoa)?);
    }
    for bad in &TURIN {
        samples.push(wrong(bad, of(Product::Turin), &turin)?);
    }
    let mut cut = samples[1].clone();
    cut.name = "cut";
    cut.about = "a report without its last byte";
    cut.fails = Some("form");
    cut.files[0].1.pop();
    samples.push(cut);
    let mut no_key = samples[1].clone();
    no_key.name = "no-vcek";
    no_key.about = "a chain without the VCEK";
    no_key.fails = Some("certificates");
    no_key.files[1].1 = genoa.above(KeyKind::Vcek).into_bytes();
    samples.push(no_key);
    Ok(samples)
}

fn good(
    name: &'static str,
    about: &'static str,
    mut making: Making,
    authorities: &Authorities,
) -> Result<Sample> {
    making.sign()?;
    Ok(Sample {
        name,
        about,
        fails: None,
        files: making.files(authorities)?,
        is_turin: making.product == Product::Turin,
    })
}

fn wrong(bad: &Bad, mut making: Making, authorities: &Authorities) -> Result<Sample> {
    (bad.before)(&mut making)?;
    making.sign()?;
    (bad.after)(&mut making)?;
    Ok(Sample {
        name: bad.name,
        about: bad.about,
        fails: Some(bad.fails),
        files: making.files(authorities)?,
        is_turin: making.product == Product::Turin,
    })
}
