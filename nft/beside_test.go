package nft

import (
	"fmt"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
)

// What other programs have in NAT: whoever gives a connection its source first, has the say. The kernel calls the NAT
// chains of a hook by their priorities, those of iptables at 100.
func TestNoSourceNATOfOthersComesBeforeOurs(t *testing.T) {
	chain := func(priority, rules string) string {
		return "table inet other { chain post { type nat hook postrouting priority " + priority + "; " + rules + "; }; }"
	}
	everything := "ip saddr 10.244.0.0/16 masquerade; ip6 saddr fd44::/16 masquerade"
	snat := "ip saddr 10.244.0.0/16 oifname eth0 snat ip to 10.10.0.101; ip6 saddr fd44::/16 oifname eth0 snat ip6 to fd10::101"
	for name, others := range map[string]string{
		"masquerade at 99":          chain("99", everything),
		"masquerade at 90":          chain("90", everything),
		"snat at 90":                chain("90", snat),
		"masquerade at 50":          chain("50", everything),
		"masquerade at -100":        chain("-100", everything),
		"snat at -100":              chain("-100", snat),
		"masquerade at -198":        chain("-198", everything),
		"iptables":                  "iptables-legacy -t nat -A POSTROUTING -s 10.244.0.0/16 -j MASQUERADE\nip6tables-legacy -t nat -A POSTROUTING -s fd44::/16 -j MASQUERADE",
		"iptables through nftables": "iptables-nft -t nat -A POSTROUTING -s 10.244.0.0/16 -j MASQUERADE\nip6tables-nft -t nat -A POSTROUTING -s fd44::/16 -j MASQUERADE",
		"kindnet":                   kindnet,
	} {
		if testing.Short() && name != "kindnet" { // emulated machines take a minute for all
			continue
		}
		t.Run(name, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			if strings.HasPrefix(others, "table ") {
				nft(t, others)
			} else {
				for line := range strings.Lines(others) {
					f := strings.Fields(line)
					if out, err := exec.Command(f[0], f[1:]...).CombinedOutput(); err != nil {
						t.Fatalf("%s: %v\n%s", line, err, out)
					}
				}
			}
			for _, f := range bothSides {
				ext.serve(f.server)
				f.addEgressIP(t)
				reach(t, tables, parseState(t, f.base()+fmt.Sprintf("pod %s 5\nnexthop 5 0x3fff\nhosted 5 %s 0x3fff\n", f.pod, f.egress)))
				if err := tables.Permit([]Permit{{netip.MustParseAddr(f.egress), true}}, time.Hour); err != nil {
					t.Fatal(err)
				}
				if got := p.seen(f.server); got != f.egress {
					t.Errorf("the pod is seen as %q, want %s (%d packets dropped by the guard)", got, f.egress, counter(t, tables, CounterGuard))
				}
				reach(t, tables, parseState(t, f.base()))
				if got := p.seen(f.server); got != f.node {
					t.Errorf("not selected: seen as %q, want the other's %s", got, f.node)
				}
			}
		})
	}
}

// kindnet is what kindnet's ipmasq programs.
const kindnet = `table inet kindnet-ipmasq {
	set noMasqV4 { type ipv4_addr; flags interval; auto-merge; elements = { 10.244.0.0/16 }; }
	set noMasqV6 { type ipv6_addr; flags interval; auto-merge; elements = { fd44::/16 }; }
	chain postrouting {
		type nat hook postrouting priority srcnat - 10;
		ct state established,related accept
		fib daddr type local accept
		ip daddr @noMasqV4 accept
		ip6 daddr @noMasqV6 accept
		counter masquerade
	}
}`

// Who has a chain of NAT at the very first priority, and made it after ours, is called first. That is for a person to
// mend, who has to be told.
func TestTheGuardReportsWhosePacketsItDropped(t *testing.T) {
	for _, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			ext.serve(f.server)
			f.addEgressIP(t)
			reach(t, tables, parseState(t, f.base()+fmt.Sprintf("pod %s 5\nnexthop 5 0x3fff\nhosted 5 %s 0x3fff\n", f.pod, f.egress)))
			if err := tables.Permit([]Permit{{netip.MustParseAddr(f.egress), true}}, time.Hour); err != nil {
				t.Fatal(err)
			}
			guarded := func() map[egress.ID]time.Duration {
				t.Helper()
				g, err := tables.Guarded()
				if err != nil {
					t.Fatal(err)
				}
				return g
			}
			if got := p.seen(f.server); got != f.egress || len(guarded()) > 0 {
				t.Errorf("the pod is seen as %q, and the guard says %v", got, guarded())
			}
			nft(t, "table inet other { chain post { type nat hook postrouting priority -199; oifname eth0 masquerade; }; }")
			if got := p.seenAtOnce(f.server); got != "" {
				t.Errorf("the pod is seen as %q", got)
			}
			if ago, ok := guarded()[5]; !ok || ago < 0 || ago > 10*time.Second {
				t.Errorf("the guard says %v, want 5 just now", guarded())
			}
		})
	}
}

func BenchmarkGuardedWithoutAny(b *testing.B) {
	tables := open(b)
	reach(b, tables, large(500))
	for b.Loop() {
		if _, err := tables.Guarded(); err != nil {
			b.Fatal(err)
		}
	}
}
