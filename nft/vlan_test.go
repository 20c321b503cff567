package nft

import (
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/egret-project/egret/internal/netns"
)

// The link of a VLAN is made for egress IPs. A host of the VLAN gets no way by it to pods, to the node, or through the node, in its own name or in a
// pod's; the egress IP itself answers an echo request, and pods reach the host.
func TestAHostOfAVLANReachesNothingButTheEgressIP(t *testing.T) {
	for i, f := range bothSides {
		t.Run(f.pod, func(t *testing.T) {
			tables := open(t)
			ext, p := outside(t), pod(t)
			p.serve(f.pod)
			c, err := net.ListenPacket("udp", net.JoinHostPort(f.node, "7000"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			go answerAll(c)
			host := newSpace(t, "vlan")
			netns.RunAll(t, "", `ip link add egret.100 type veth peer name eth0 netns `+host.name+`
				ip link set egret.100 up
				ip addr add 10.20.0.8/24 dev egret.100
				ip addr add fd20::8/64 dev egret.100 nodad preferred_lft 0
				sysctl -qw net.ipv4.conf.egret/100.rp_filter=2`)
			host.run(`ip link set eth0 up
				ip addr add 10.20.0.77/24 dev eth0
				ip addr add fd20::77/64 dev eth0 nodad
				ip route add default via 10.20.0.8
				ip -6 route add default via fd20::8`)
			egress, own, family := []string{"10.20.0.8", "fd20::8"}[i], []string{"10.20.0.77", "fd20::77"}[i], []string{"ip", "ip6"}[i]
			host.serve(own)
			nft(t, fmt.Sprintf(`table inet lb { chain pre { type nat hook prerouting priority -100;
				%s daddr %s udp dport 7009 dnat to %s; }; }`, family, f.node, netip.AddrPortFrom(netip.MustParseAddr(f.pod), 7000)))
			reach(t, tables, parseState(t, fmt.Sprintf("except %s\naddressguard %s\npod %s 5\nnexthop 5 0x3fff\nhosted 5 %[2]s 0x3fff\n", f.pods, egress, f.pod)))
			if err := tables.Permit([]Permit{{netip.MustParseAddr(egress), true}}, time.Hour); err != nil {
				t.Fatal(err)
			}
			if got := p.seen(own); got != egress {
				t.Errorf("the host sees the pod as %q, want %s", got, egress)
			}
			if !host.ok("ping -c1 -W2 " + egress) {
				t.Error("the egress IP answers no echo request")
			}
			for what, to := range map[string][2]string{
				"a pod": {f.pod, "7000"}, "the node": {f.node, "7000"}, "a NodePort": {f.node, "7009"},
			} {
				if got := answer(t, ext.in(), f.node, to[1]); what != "a pod" && got == "" {
					t.Fatalf("%s answers nobody", what)
				}
				counts(t, tables, CounterSubnet, func() {
					if got := answer(t, host.in(), to[0], to[1]); got != "" {
						t.Errorf("%s answers a host of the VLAN", what)
					}
				})
			}
			counts(t, tables, CounterSubnet, func() {
				if host.ok("ping -c1 -W0.5 " + f.node) {
					t.Error("the node answers an echo request of a host of the VLAN")
				}
			})
			for who, source := range map[string]string{"a host of the VLAN": own, "a host of the VLAN, as a pod": f.pod} {
				counts(t, tables, CounterSubnet, func() {
					sneaks(t, who, ext, f, func() {
						host.do(func() error {
							return raw(netip.MustParseAddr(source), netip.MustParseAddr(f.server), 7002, []byte("forged"))
						})
					})
				})
			}
		})
	}
}
