package check

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	netfilter "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/need"
	"github.com/egret-project/egret/internal/netns"
)

// run returns the finding of that name.
func run(t *testing.T, name string) Finding {
	t.Helper()
	all, err := Run(netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if f.Check == name {
			return f
		}
	}
	t.Fatalf("no finding is called %s: %v", name, all)
	return Finding{}
}

func TestEveryFindingSaysAllOfIt(t *testing.T) {
	netns.Enter(t)
	all, err := Run(netip.Addr{})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if f.Check == "" || f.Found == "" || f.For == "" || (f.Level == OK) != (f.Consequence == "") {
			t.Errorf("finding %+v", f)
		}
		if f.Level == Missing {
			t.Errorf("this kernel lacks %s: %s", f.Check, f.Found)
		}
	}
	names := strings.Join(Names(all), " ")
	if !strings.Contains(names, "vxlan-gbp") || !strings.Contains(names, ARPAnswers) || strings.Contains(names, "kernel") {
		t.Errorf("features %q", names)
	}
	if out := netns.Run(t, "ip -br link"); strings.Contains(out, "t-") {
		t.Errorf("the check leaves links:\n%s", out)
	}
}

// What the log of connections has of bytes and times, the kernel says only where it is told to keep it, which it is not
// by itself. That is no fault of a node that logs none.
func TestWhatTheLogOfConnectionsNeedsIsNamed(t *testing.T) {
	named := 0
	for _, f := range sysctls() {
		if name := f.Check; name == "net.netfilter.nf_conntrack_acct" || name == "net.netfilter.nf_conntrack_timestamp" {
			if named++; f.Level != OK || !strings.Contains(f.For, "while it is 1") {
				t.Errorf("finding %+v", f)
			}
		}
	}
	if named != 2 {
		t.Errorf("%d of 2 settings are named", named)
	}
}

func TestOthersInReservedPlacesAreFound(t *testing.T) {
	tests := map[string]struct{ check, do, names string }{
		"a rule":                                     {"rule-priorities", "ip rule add pref 1500 table main", "rule 1500"},
		"a rule of ours":                             {"rule-priorities", "ip rule add pref 1500 table main protocol 94", ""},
		"a rule elsewhere":                           {"rule-priorities", "ip rule add pref 2000 table main", ""},
		"a mark in a rule":                           {"packet-mark", "ip rule add pref 2000 fwmark 0x10/0xff table main", "rule 2000 fwmark 0x10/0xff"},
		"a mark beside ours in a rule":               {"packet-mark", "ip rule add pref 2000 fwmark 0x100000/0xf70000 table main", ""},
		"the bit of an id in a rule":                 {"packet-mark", "ip rule add pref 2000 fwmark 0x80000/0xff0000 table main", "rule 2000 fwmark 0x80000/0xff0000"},
		"a bit of an id in a rule":                   {"packet-mark", "ip rule add pref 2000 fwmark 0x4000/0x4000 table main", "rule 2000 fwmark 0x4000/0x4000"},
		"an id's bit in a chain":                     {"packet-mark", "nft table ip o { chain c { type filter hook prerouting priority -150; meta mark set meta mark | 0x80000; } ; }", "chain ip o c"},
		"its bit in a jump":                          {"packet-mark", "nft table ip o { chain c { meta mark set meta mark | 0x80000; } ; chain p { type filter hook prerouting priority -150; jump c; } ; }", "chain ip o c"},
		"its bit, restored":                          {"packet-mark", "iptables-nft -t mangle -A PREROUTING -j CONNMARK --restore-mark --nfmask 0x80000 --ctmask 0x80000", "chain ip mangle PREROUTING"},
		"its bit, by iptables":                       {"packet-mark", "iptables-nft -t mangle -A PREROUTING -j MARK --set-xmark 0x80000/0x80000", "chain ip mangle PREROUTING"},
		"its bit, later":                             {"packet-mark", "nft table ip o { chain c { type filter hook forward priority 0; meta mark set meta mark | 0x80000; } ; }", ""},
		"its bit, cleared":                           {"packet-mark", "nft table ip o { chain c { type filter hook prerouting priority -150; meta mark set meta mark & 0xfff7ffff; } ; }", ""},
		"its bit, as by Calico":                      {"packet-mark", "iptables-nft -t raw -A PREROUTING -j MARK --set-xmark 0/0xf0000", ""},
		"a bit in a chain":                           {"packet-mark", "nft table ip o { chain c { meta mark set meta mark | 0x10; } ; }", "chain ip o c"},
		"a mark out of a map":                        {"packet-mark", "nft table ip o { chain c { meta mark set ip saddr map { 10.0.0.1 : 0x10 }; } ; }", "chain ip o c"},
		"a connection mark out of a map":             {"conn-mark", "nft table ip o { chain c { ct mark set ip saddr map { 10.0.0.1 : 0x10 }; } ; }", "chain ip o c"},
		"a mark by chance":                           {"packet-mark", "nft table ip o { chain c { meta mark set numgen random mod 2; } ; }", "chain ip o c"},
		"kube-proxy's bit in a chain":                {"packet-mark", "nft table ip o { chain c { meta mark set meta mark | 0x4000; } ; }", ""},
		"a whole mark in a chain":                    {"packet-mark", "nft table ip o { chain c { meta mark set 0x10000; } ; }", "chain ip o c"},
		"reading the mark":                           {"packet-mark", "nft table ip o { chain c { meta mark 0x10 accept; } ; }", ""},
		"the ct mark is another":                     {"packet-mark", "nft table ip o { chain c { ct mark set 0x10; } ; }", ""},
		"a connection mark":                          {"conn-mark", "nft table ip o { chain c { ct mark set 0x10; } ; }", "chain ip o c"},
		"a bit of a connection mark":                 {"conn-mark", "nft table inet o { chain c { ct mark set ct mark | 0x1; } ; }", "chain inet o c"},
		"a packet mark that is saved":                {"conn-mark", "nft table ip o { chain c { ct mark set meta mark; } ; }", "chain ip o c"},
		"a packet mark that comes from a connection": {"conn-mark", "nft table ip o { chain c { meta mark set ct mark; } ; }", ""},
		"a route":                                    {"route-tables", "ip route add 10.0.0.0/8 dev lo table 7003", "table 7003"},
		"a route of ours":                            {"route-tables", "ip route add 10.0.0.0/8 dev lo table 7003 proto 94", ""},
		"a chain that drops":                         {"forward-policy", "nft table inet o { chain c { type filter hook forward priority 0; policy drop; } ; }", "chain inet o c"},
		"a chain that drops, but not ours":           {"forward-policy", "nft table ip o { chain c { type filter hook forward priority 0; policy drop; iifname egret.vx accept; oifname egret.vx accept; } ; }", ""},
		"a chain that drops, but no link so named":   {"forward-policy", "nft table ip o { chain c { type filter hook forward priority 0; policy drop; iifname egret.v* accept; oifname egret.v* accept; } ; }", ""},
		"a chain that drops what is for the node":    {"forward-policy", "nft table ip o { chain c { type filter hook input priority 0; policy drop; } ; }", ""},
		"a chain that rejects the rest":              {"forward-policy", "nft table inet o { chain c { type filter hook forward priority 10; policy accept; ct state established accept; counter reject with icmpx admin-prohibited; } ; }", "chain inet o c"},
		"a chain that drops the rest":                {"forward-policy", "nft table ip o { chain c { type filter hook forward priority 10; ip saddr 10.0.0.1 accept; drop; } ; }", "chain ip o c"},
		"iptables that reject the rest":              {"forward-policy", "iptables-nft -A FORWARD -j REJECT", "chain ip filter FORWARD"},
		"a chain that rejects something":             {"forward-policy", "nft table inet o { chain c { type filter hook forward priority 10; policy accept; tcp dport 22 reject; } ; }", ""},
		"NAT before ours":                            {"nat-chains", "nft table inet o { chain c { type nat hook postrouting priority -199; } ; }", "chain inet o c at priority -199"},
		"NAT behind ours":                            {"nat-chains", "nft table inet o { chain c { type nat hook postrouting priority -198; } ; }", ""},
		"NAT of destinations":                        {"nat-chains", "nft table inet o { chain c { type nat hook prerouting priority -199; } ; }", ""},
		"NAT of destinations before ours":            {"dnat-chains", "nft table inet o { chain c { type nat hook prerouting priority -199; } ; }", "chain inet o c at priority -199"},
		"NAT of the node's own before ours":          {"dnat-chains", "nft table inet o { chain c { type nat hook output priority -199; } ; }", "chain inet o c at priority -199"},
		"NAT of destinations behind ours":            {"dnat-chains", "nft table inet o { chain c { type nat hook prerouting priority -198; } ; }", ""},
		"NAT of sources":                             {"dnat-chains", "nft table inet o { chain c { type nat hook postrouting priority -199; } ; }", ""},
		"a rule without a priority":                  {"rules-ahead", "ip rule add pref 1000 fwmark 0/0x2000 iif lo lookup 15189 protocol 94 && ip rule add lookup 51820", "ip rule 999 lookup 51820"},
		"a rule of wg-quick":                         {"rules-ahead", "ip rule add pref 900 not fwmark 51820 lookup 51820", "ip rule 900"},
		"a rule of IPv6":                             {"rules-ahead", "ip -6 rule add pref 900 lookup 51820", "ip -6 rule 900"},
		"a rule for another's mark":                  {"rules-ahead", "ip rule add pref 99 fwmark 0x100000/0x100000 lookup 500", ""},
		"a rule for a mark that may be ours":         {"rules-ahead", "ip rule add pref 9 fwmark 0x200/0xf00 lookup 2004", "ip rule 9"},
		"a rule for marks that are not ours":         {"rules-ahead", "ip rule add pref 9 fwmark 0/0x2000 lookup 2004", ""},
		"a rule for what the node sends":             {"rules-ahead", "ip rule add pref 9 iif lo lookup 2004", ""},
		"the table local, later":                     {"rules-ahead", "ip rule add pref 100 lookup local", ""},
		"a rule behind ours":                         {"rules-ahead", "ip rule add pref 3000 lookup 500", ""},
		"no flowtable":                               {"flowtables", "ip rule", ""},
		"the table of a trace":                       {"nat-chains", "nft table inet egret-trace { chain c { type nat hook postrouting priority -199; } ; }", ""},
		"connections begin with a SYN":               {"net.netfilter.nf_conntrack_tcp_loose", "sysctl -qw net.netfilter.nf_conntrack_tcp_loose=0", "0"},
		"the node's answers have a mark":             {"net.ipv4.fwmark_reflect", "sysctl -qw net.ipv4.fwmark_reflect=1", "1"},
		"the node's answers of IPv6 have a mark":     {"net.ipv6.fwmark_reflect", "sysctl -qw net.ipv6.fwmark_reflect=1", "1"},
		"the mark counts for rp_filter":              {"net.ipv4.conf.all.src_valid_mark", "sysctl -qw net.ipv4.conf.all.src_valid_mark=1", ""},
		"forwarding is off":                          {"net.ipv4.ip_forward", "sysctl -qw net.ipv4.ip_forward=0", "0"},
		"the overlay's port":                         {"overlay-port", "ip link add o type vxlan id 9 dstport 8479 && ip link set o up", "another program"},
		"another port":                               {"overlay-port", "ip link add o type vxlan id 9 dstport 8478 && ip link set o up", ""},
		"no default route":                           {"uplink", "ip route show", "there is no default route"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			netns.Enter(t)
			for line := range strings.SplitSeq(tt.do, " && ") {
				netns.Run(t, line)
			}
			f := run(t, tt.check)
			if (f.Level == OK) != (tt.names == "") || !strings.Contains(f.Found, tt.names) {
				t.Errorf("%s: %+v, want it to name %q", tt.do, f, tt.names)
			}
		})
	}
}

func TestAFlowtableOfOthersIsFound(t *testing.T) {
	need.Flowtable(t)
	netns.Enter(t)
	netns.Run(t, "nft add table inet fast")
	netns.Run(t, "nft add flowtable inet fast path { hook ingress priority 0 ; devices = { lo } ; }")
	if f := run(t, "flowtables"); f.Level != Warning || f.Found != "flowtable inet fast path" {
		t.Errorf("%+v", f)
	}
}

func TestUplinkIsThatOfTheNodeIP(t *testing.T) {
	netns.Enter(t)
	for _, line := range []string{"ip link add up0 type veth peer name peer0", "ip addr add 10.1.0.1/24 dev up0", "ip addr add 10.2.0.1/24 dev peer0", "ip link set up0 mtu 1400"} {
		netns.Run(t, line)
	}
	for ip, want := range map[string]string{"10.1.0.1": "up0, MTU 1400, overlay MTU 1350", "10.2.0.1": "peer0, MTU 1500, overlay MTU 1450", "10.3.0.1": "none: no link carries 10.3.0.1"} {
		if f := uplink(netip.MustParseAddr(ip)); f.Found != want {
			t.Errorf("%s: found %q, want %q", ip, f.Found, want)
		}
	}
}

// A container that is not privileged makes no network namespace, and the agent goes by what is tried: whether it holds
// IPs of VLANs, and answers ARP.
func TestWithoutANamespaceOfItsOwnTheCheckChangesNothing(t *testing.T) {
	netns.Enter(t)
	before := netns.Run(t, "nft list ruleset") + netns.Run(t, "ip -br link")
	can := Names(features())
	for _, p := range probes {
		if p.dryRun == nil {
			continue
		}
		for range 2 { // what one leaves would be in the way of the other
			if err := p.dryRun(); (err == nil) != slices.Contains(can, p.name) {
				t.Errorf("%s: %v; in a namespace of its own it finds %q", p.name, err, can)
			}
		}
	}
	if after := netns.Run(t, "nft list ruleset") + netns.Run(t, "ip -br link"); after != before {
		t.Errorf("it leaves\n%s", after)
	}
	// What the kernel does not know is found missing.
	unknown := message(unix.NFT_MSG_NEWTABLE, unix.NFPROTO_INET,
		netfilter.Attribute{Type: unix.NFTA_TABLE_NAME, Data: []byte(dryName + "\x00")}, netfilter.Attribute{Type: unix.NFTA_TABLE_FLAGS, Data: []byte{0x40, 0, 0, 0}})
	if err := dry(unix.NFPROTO_INET, unknown); err == nil {
		t.Error("a table with a flag that there is not is taken for one that can be")
	}
	if err := netlink.LinkAdd(&netlink.GenericLink{LinkAttrs: named("t-none"), LinkType: "egret-none"}); !errors.Is(err, unix.EOPNOTSUPP) {
		t.Errorf("a link of an unknown type: %v, want what is not EINVAL", err)
	}
}

func TestWithoutCAPSYSADMINTheCheckSaysWhatItDidNotTry(t *testing.T) {
	netns.Enter(t)
	netns.Keep(t, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW)
	can := Names(features())
	out := tryAll(unix.Unshare(unix.CLONE_NEWNET))
	names := Names(out)
	for _, want := range []string{VLAN, ARPAnswers, "nft-owner"} {
		if slices.Contains(names, want) != slices.Contains(can, want) {
			t.Errorf("%q are there, and in a namespace of its own %q: want %s in both, or in none", names, can, want)
		}
	}
	last := out[len(out)-1]
	if last.Check != Untried || last.Level != Warning || !strings.Contains(last.Found, "nft-maps") || slices.Contains(names, "nft-maps") {
		t.Errorf("%q are tried, and %+v", names, last)
	}
}
