//! Which command does what in which state: the model against the rules as they are written down.

mod common;
#[path = "../examples/states/table.rs"]
mod table;

use table::Table;

/// Compares with a table in which `.` stands for the status of a wrong state.
fn compare(got: &Table, wrong_state: &str, expected: &str) {
    let mut lines = expected.lines().map(str::trim).filter(|l| !l.is_empty());
    for (command, cells) in got {
        let cells: Vec<_> = cells
            .iter()
            .map(|c| if c == wrong_state { "." } else { c })
            .collect();
        let line = format!("{command} {}", cells.join(" "));
        assert_eq!(Some(line.as_str()), lines.next());
    }
    assert_eq!(lines.next(), None);
}

#[test]
fn the_documented_page_is_what_the_model_prints() {
    let page = include_str!("../docs/states.md");
    assert_eq!(
        table::page(),
        page,
        "run: cargo run --example states > docs/states.md"
    );
}

#[test]
fn platform_commands_by_platform_state() {
    compare(
        &table::platform_table(),
        "0x01",
        "INIT ->INIT . .
         INIT_EX ->INIT . .
         SHUTDOWN = ->UNINIT ->UNINIT
         FACTORY_RESET = . .
         PLATFORM_STATUS = = =
         PEK_GEN . = .
         PEK_CSR . = =
         PEK_CERT_IMPORT . = .
         PDH_CERT_EXPORT . = =
         PDH_GEN . = =
         DF_FLUSH . = =
         GET_ID = = =
         NOP = = =
         LAUNCH_START . ->WORKING =
         RECEIVE_START . ->WORKING =
         GUEST_STATUS . . =
         DECOMMISSION . . ->INIT",
    );
}

#[test]
fn guest_commands_by_guest_state() {
    compare(
        &table::guest_table(),
        "0x02",
        "LAUNCH_UPDATE_DATA = . . . . .
         LAUNCH_UPDATE_VMSA = . . . . .
         LAUNCH_MEASURE ->LSECRET . . . . .
         LAUNCH_UPDATE_SECRET . = . . . .
         LAUNCH_FINISH . ->RUNNING . . . .
         ATTESTATION . = = = . .
         SEND_START . . ->SUPDATE . . .
         SEND_UPDATE_DATA . . . = . .
         SEND_UPDATE_VMSA . . . = . .
         SEND_FINISH . . . ->SENT . .
         SEND_CANCEL . . . ->RUNNING . .
         RECEIVE_UPDATE_DATA . . . . = .
         RECEIVE_UPDATE_VMSA . . . . = .
         RECEIVE_FINISH . . . . ->RUNNING .
         ACTIVATE = = = = = .
         ACTIVATE_EX = = = = = .
         DEACTIVATE = = = = = =
         GUEST_STATUS = = = = = =
         DECOMMISSION free free free free free free
         DBG_DECRYPT = = = = = .
         DBG_ENCRYPT = = = = = .
         COPY = = = = = .",
    );
}

#[test]
fn snp_commands_by_platform_and_guest_state() {
    compare(
        &table::snp_platform_table(),
        "0x01",
        "SNP_INIT ->INIT .
         SNP_INIT_EX ->INIT .
         SNP_SHUTDOWN = ->UNINIT
         SNP_SHUTDOWN_EX = ->UNINIT
         SNP_PLATFORM_STATUS = =
         SNP_FEATURE_INFO = =
         SNP_DF_FLUSH . =
         SNP_PAGE_RECLAIM . =
         SNP_PAGE_UNSMASH . =
         SNP_PAGE_SET_STATE . =
         SNP_CONFIG . =
         SNP_COMMIT . =
         SNP_GCTX_CREATE . =",
    );
    compare(
        &table::snp_guest_table(),
        "0x02",
        "SNP_LAUNCH_START ->LAUNCH . .
         SNP_ACTIVATE . = =
         SNP_ACTIVATE_EX . = =
         SNP_LAUNCH_UPDATE . = .
         SNP_LAUNCH_FINISH . ->RUNNING .
         SNP_GUEST_REQUEST . . =
         SNP_PAGE_MOVE . . =
         SNP_DBG_DECRYPT . = =
         SNP_DBG_ENCRYPT . = =
         SNP_GUEST_STATUS = = =
         SNP_DECOMMISSION free free free",
    );
}

#[path = "../examples/layouts/page.rs"]
mod layouts;

#[test]
fn the_documented_layouts_are_those_of_the_model() {
    let page = include_str!("../docs/layouts.md");
    assert_eq!(
        layouts::page(),
        page,
        "run: cargo run --example layouts > docs/layouts.md"
    );
}
