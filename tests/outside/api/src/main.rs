//! `api FILE.json`: the public API of the crate that rustdoc described in this file, an item a line.
//!
//! Left out is what the compiler and `derive` add to each type in the same way. Where the file has
//! another version of the format, the program says so and exits with 3.

use std::path::Path;
use std::process::ExitCode;
use std::{env, fs};

/// The version of rustdoc's JSON that the crate public-api reads.
const FORMAT: u64 = 57;

const OTHER_FORMAT: u8 = 3;

fn format_of(file: &Path) -> Result<Option<u64>, String> {
    let text = fs::read(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let json: serde_json::Value = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    Ok(json["format_version"].as_u64())
}

fn listing(file: &Path) -> Result<String, String> {
    let api = public_api::Builder::from_rustdoc_json(file)
        .omit_blanket_impls(true)
        .omit_auto_trait_impls(true)
        .omit_auto_derived_impls(true)
        .build();
    Ok(api.map_err(|error| error.to_string())?.to_string())
}

fn main() -> ExitCode {
    let Some(file) = env::args_os().nth(1) else {
        eprintln!("usage: api FILE.json");
        return ExitCode::FAILURE;
    };
    let file = Path::new(&file);
    match format_of(file) {
        Ok(Some(FORMAT)) => {}
        Ok(other) => {
            eprintln!("rustdoc's JSON has the format {other:?}, and {FORMAT} is read here");
            return ExitCode::from(OTHER_FORMAT);
        }
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    }
    match listing(file) {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
