//! The grammar of iproute2: abbreviated commands, and `name value` pairs.

use vdpa_control::api::{AddRequest, Attrs, LimitChange, Link, SetRequest, parse_size};
use vdpa_control::config::MacAddr;

use crate::failure::Failure;

/// Whether `word` is `full` or a prefix of it.
pub(crate) fn matches(word: &str, full: &str) -> bool {
    !word.is_empty() && full.starts_with(word)
}

/// The failure for an unknown command.
pub(crate) fn no_command(word: &str) -> Failure {
    Failure::Usage(format!("Command \"{word}\" not found"))
}

/// Runs a command of an object that can only be shown: `show` (the default), `list` or `help`. Calls `show` with the arguments that
/// follow.
pub(crate) fn show_only(
    help: &str,
    args: &[String],
    show: impl FnOnce(&[String]) -> Result<(), Failure>,
) -> Result<(), Failure> {
    match args {
        [] => show(&[]),
        [word, ..] if matches(word, "help") => {
            eprint!("{help}");
            Ok(())
        }
        [word, rest @ ..] if matches(word, "show") || matches(word, "list") => show(rest),
        [word, ..] => Err(no_command(word)),
    }
}

/// The only argument, for commands that take one: `DEV`, `NAME`.
pub(crate) fn only(args: &[String]) -> Result<&str, Failure> {
    match args {
        [] => Err(Failure::Usage("String parameter expected".into())),
        [word] => Ok(word),
        [_, extra, ..] => Err(unknown_option(extra)),
    }
}

/// The failure for a word that is not the name of a pair.
pub(crate) fn unknown_option(word: &str) -> Failure {
    Failure::Usage(format!("Unknown option \"{word}\""))
}

/// The failure for a last word that has no value.
fn no_value(word: &str) -> Failure {
    Failure::Usage(format!(
        "Unknown option \"{word}\": it is the last word, and attributes are pairs of NAME VALUE (only readonly may stand alone)"
    ))
}

/// Checks the handle of a management device: `NAME` or `BUS/NAME`.
pub(crate) fn handle(args: &[String]) -> Result<&str, Failure> {
    let Some(word) = args.first() else {
        return Err(Failure::Usage(
            "vdpa identification (\"mgmtdev_bus_name/mgmtdev_name\") expected".into(),
        ));
    };
    if word.matches('/').count() > 1 {
        return Err(Failure::Usage(
            "Wrong vdpa mgmtdev identification string format\n\
             Expected \"mgmtdev_bus_name/mgmtdev_name\"\n\
             Expected \"mgmtdev_name\""
                .into(),
        ));
    }
    Ok(word)
}

/// Takes the word `persistent` from the end of the arguments, unless it is the value of `serial`. Returns the rest, and whether it was
/// there.
pub(crate) fn persistent(args: &[String]) -> (&[String], bool) {
    match args.split_last() {
        Some((last, rest)) if last == "persistent" && rest.last().is_none_or(|word| word != "serial") => {
            (rest, true)
        }
        _ => (args, false),
    }
}

/// Parses the pairs of `dev add`.
///
/// Checks the attributes of iproute2 as iproute2 does. Passes on any other pair, because the management devices of the daemon have
/// more attributes.
pub(crate) fn add_request(mut args: &[String]) -> Result<AddRequest, Failure> {
    let (mut name, mut mgmtdev, mut attrs) = (None, None, Attrs::new());
    while let [word, rest @ ..] = args {
        args = rest.get(1..).unwrap_or_default();
        // The order of iproute2, which decides what an ambiguous abbreviation means.
        let (attr, value) = match word.as_str() {
            word if matches(word, "name") => {
                name = Some(value(rest)?.to_owned());
                continue;
            }
            word if matches(word, "mgmtdev") => {
                mgmtdev = Some(handle(rest)?.to_owned());
                continue;
            }
            "mac" => ("mac", mac_addr(value(rest)?)?.to_string()),
            "mtu" => ("mtu", u16_text("mtu", 68, rest)?),
            word if matches(word, "max_vqp") => ("max_vqp", u16_text("max_vqp", 1, rest)?),
            word if matches(word, "device_features") => ("device_features", hexadecimal(value(rest)?)?),
            "readonly" => {
                let switch = rest.first().filter(|value| matches!(value.as_str(), "on" | "off"));
                if switch.is_none() {
                    args = rest;
                }
                ("readonly", switch.cloned().unwrap_or_else(|| "on".into()))
            }
            word => {
                let value = rest.first().ok_or_else(|| no_value(word))?;
                (word, value.clone())
            }
        };
        attrs.insert(attr, value).map_err(|error| Failure::Usage(error.to_string()))?;
    }
    // The daemon does not know the directory of its caller.
    if let Ok(directory) = std::env::current_dir() {
        attrs.resolve_paths(&directory);
    }
    let mgmtdev = mgmtdev.ok_or_else(|| Failure::Usage("management device handle not set.".into()))?;
    let name = name.ok_or_else(|| Failure::Usage("device name is not set.".into()))?;
    Ok(AddRequest { name, mgmtdev, attrs })
}

/// Parses the pairs of `dev set`: the name of a device, and the changes.
pub(crate) fn set_request(mut args: &[String]) -> Result<(String, SetRequest), Failure> {
    let (mut name, mut request) = (None, SetRequest::default());
    while let [word, rest @ ..] = args {
        args = rest.get(1..).unwrap_or_default();
        match word.as_str() {
            word if matches(word, "name") => name = Some(value(rest)?.to_owned()),
            "mac" => request.mac = Some(mac_addr(value(rest)?)?),
            "link" => request.link = Some(link(value(rest)?)?),
            "iops" => limits(&mut request).iops = Some(limit("iops", value(rest)?)?),
            "bps" => limits(&mut request).bps = Some(limit("bps", value(rest)?)?),
            "burst" => limits(&mut request).burst_ms = Some(limit("burst", value(rest)?)?),
            "size" => request.size = Some(value(rest)?.parse().map_err(Failure::Usage)?),
            word => return Err(unknown_option(word)),
        }
    }
    let name = name.ok_or_else(|| Failure::Usage("device name is not set.".into()))?;
    Ok((name, request))
}

fn value(rest: &[String]) -> Result<&str, Failure> {
    rest.first().map(String::as_str).ok_or_else(|| Failure::Usage("String parameter expected".into()))
}

fn limits(request: &mut SetRequest) -> &mut LimitChange {
    request.limits.get_or_insert_default()
}

/// A number; "none" is 0.
fn limit(name: &str, text: &str) -> Result<u64, Failure> {
    if text == "none" {
        return Ok(0);
    }
    parse_size(text).ok_or_else(|| {
        Failure::Usage(format!("{name} is \"{text}\": \"none\" or a number is right, also with K, M, G or T"))
    })
}

fn link(text: &str) -> Result<Link, Failure> {
    match text {
        "up" => Ok(Link::Up),
        "down" => Ok(Link::Down),
        _ => Err(Failure::Usage(format!("link is \"{text}\": up or down is right"))),
    }
}

fn mac_addr(text: &str) -> Result<MacAddr, Failure> {
    text.parse::<MacAddr>().map_err(|error| Failure::Usage(format!("mac {error}")))
}

/// A number that fits its type; whether the device takes it the daemon says. `min` is the smallest that it can take.
fn u16_text(name: &str, min: u16, rest: &[String]) -> Result<String, Failure> {
    let right = format!("a number from {min} to {} is right", u16::MAX);
    let text = rest.first().ok_or_else(|| Failure::Usage(format!("{name}: number expected; {right}")))?;
    text.parse::<u16>()
        .map(|number| number.to_string())
        .map_err(|_| Failure::Usage(format!("{name} is \"{text}\"; {right}")))
}

/// Parses features: hexadecimal with or without `0x`, as in iproute2.
fn hexadecimal(text: &str) -> Result<String, Failure> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")).unwrap_or(text);
    u64::from_str_radix(digits, 16)
        .ok()
        .filter(|_| !digits.starts_with('+'))
        .map(|features| format!("{features:#x}"))
        .ok_or_else(|| {
            Failure::Usage(format!(
                "device_features \"{text}\" is not a feature word; 0x300000000 would be one"
            ))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vdpa_control::api::NewSize;

    fn request(text: &str) -> Result<AddRequest, String> {
        let args: Vec<_> = text.split(' ').map(str::to_owned).collect();
        add_request(&args).map_err(|failure| match failure {
            Failure::Usage(text) => text,
            other => format!("{other:?}"),
        })
    }

    #[test]
    fn pairs_in_any_order_and_abbreviated() {
        let added =
            request("mg auxiliary/sf.4 mtu 9000 n v0 max 2 mac 0:1:2:3:4:ff device 300000000").unwrap();
        assert_eq!((added.name.as_str(), added.mgmtdev.as_str()), ("v0", "auxiliary/sf.4"));
        assert_eq!(
            added.attrs.iter().collect::<Vec<_>>(),
            [
                ("mtu", "9000"),
                ("max_vqp", "2"),
                ("mac", "00:01:02:03:04:ff"),
                ("device_features", "0x300000000")
            ]
        );
    }

    #[test]
    fn relative_paths_are_of_the_directory_of_the_caller() {
        let here = std::env::current_dir().unwrap();
        let here = here.to_str().unwrap();
        let added = request("name b mgmtdev blk path a/b.img device_file ../vhost serial a/b").unwrap();
        assert_eq!(added.attrs.get("path"), Some(format!("{here}/a/b.img").as_str()));
        assert_eq!(added.attrs.get("device_file"), Some(format!("{here}/../vhost").as_str()));
        assert_eq!(added.attrs.get("serial"), Some("a/b"));
        assert_eq!(request("name b mgmtdev blk path /x").unwrap().attrs.get("path"), Some("/x"));
    }

    #[test]
    fn a_lone_readonly_is_on() {
        let attrs = |text| {
            let request = request(text).unwrap();
            request.attrs.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>()
        };
        assert_eq!(attrs("name b mgmtdev blk readonly path /x"), ["readonly=on", "path=/x"]);
        assert_eq!(attrs("name b mgmtdev blk path /x readonly"), ["path=/x", "readonly=on"]);
        assert_eq!(attrs("name b mgmtdev blk readonly off path /x"), ["readonly=off", "path=/x"]);
    }

    #[test]
    fn a_device_is_named_and_its_new_address() {
        let set = |text: &str| {
            let args: Vec<_> = text.split(' ').map(str::to_owned).collect();
            set_request(&args).map_err(|failure| match failure {
                Failure::Usage(text) => text,
                other => format!("{other:?}"),
            })
        };
        let mac = Some(MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
        assert_eq!(
            set("mac 52:54:0:12:34:56 n v0"),
            Ok(("v0".into(), SetRequest { mac, ..SetRequest::default() }))
        );
        let link = Some(Link::Down);
        assert!(set("link down v0").is_err());
        assert_eq!(set("name v0 link down"), Ok(("v0".into(), SetRequest { link, ..SetRequest::default() })));
        let size = Some(NewSize::Bytes(2 << 30));
        assert_eq!(set("name v0 size 2G"), Ok(("v0".into(), SetRequest { size, ..SetRequest::default() })));
        let size = Some(NewSize::Auto);
        assert_eq!(set("size auto name v0"), Ok(("v0".into(), SetRequest { size, ..SetRequest::default() })));
        let limits = Some(LimitChange { iops: Some(1024), bps: Some(0), burst_ms: Some(50) });
        let request = SetRequest { limits, ..SetRequest::default() };
        assert_eq!(set("name v0 iops 1K bps none burst 50"), Ok(("v0".into(), request)));
        assert!(set("name v0 iops lots").unwrap_err().contains("\"none\" or a number is right"));
        assert!(set("name v0 size large").unwrap_err().contains("\"auto\" or a number of bytes"));
        assert!(set("name v0 link left").is_err());
        assert_eq!(set("name v0"), Ok(("v0".into(), SetRequest::default())));
        assert_eq!(set("mac 52:54:0:12:34:56").unwrap_err(), "device name is not set.");
        assert_eq!(set("name v0 mtu 1400").unwrap_err(), "Unknown option \"mtu\"");
        assert_eq!(set("v0 mac 52:54:0:12:34:56").unwrap_err(), "Unknown option \"v0\"");
        assert_eq!(set("name v0 ma 52:54:0:12:34:56").unwrap_err(), "Unknown option \"ma\"");
        assert!(set("name v0 mac zz").unwrap_err().contains("not an Ethernet address"));
    }

    #[test]
    fn errors_name_the_argument() {
        let error = |text| request(text).unwrap_err();
        assert_eq!(error("name v0"), "management device handle not set.");
        assert_eq!(error("mgmtdev m"), "device name is not set.");
        assert_eq!(error("mgmtdev m name"), "String parameter expected");
        let last = error("name v0 mgmtdev m path");
        assert!(last.starts_with("Unknown option \"path\": it is the last word"), "{last}");
        assert_eq!(error("name v0 mgmtdev m readonly yes").replace("yes", "path"), last);
        assert_eq!(
            error("name v0 mgmtdev m mtu"),
            "mtu: number expected; a number from 68 to 65535 is right"
        );
        assert_eq!(
            error("name v0 mgmtdev m mtu 65536"),
            "mtu is \"65536\"; a number from 68 to 65535 is right"
        );
        let pairs = error("name v0 mgmtdev m max_vqp many");
        assert_eq!(pairs, "max_vqp is \"many\"; a number from 1 to 65535 is right");
        assert!(error("name v0 mgmtdev a/b/c").starts_with("Wrong vdpa mgmtdev identification"));
        assert!(error("name v0 mgmtdev m mac 1:2:3").contains("not an Ethernet address"));
        assert!(error("name v0 mgmtdev m device_features 0xg").contains("not a feature word"));
        assert!(error("name v0 mgmtdev m path /a path /b").contains("given twice"));
    }
}
