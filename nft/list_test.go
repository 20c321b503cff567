package nft

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/egret-project/egret/egress"
)

func TestListPrintsWhatTheKernelHas(t *testing.T) {
	tables := openWithOverlay(t)
	text := func(most int) string {
		t.Helper()
		var out bytes.Buffer
		if err := tables.List(&out, most); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	if got := text(10); got != "table inet egret: absent\ntable arp egret: absent\ntable netdev egret: absent\n" {
		t.Errorf("without tables:\n%s", got)
	}
	pods := map[netip.Addr]egress.ID{}
	for i := range byte(5) {
		pods[netip.AddrFrom4([4]byte{10, 244, 0, i + 1})] = 7
	}
	ip := netip.MustParseAddr("10.10.0.11")
	reach(t, tables, State{Pods: pods, Hosted: map[egress.ID]Hosted{7: {IP: ip, Mark: egress.LocalMark}}, Except: []netip.Prefix{netip.MustParsePrefix("10.96.0.0/16")}, FirstPacketDelay: 2 * time.Second})
	if err := tables.Permit([]Permit{{IP: ip, Answer: true}}, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	nft(t, "add rule inet egret input counter accept\nadd chain inet egret stranger\n")
	got := text(3)
	for _, want := range []string{
		"table inet egret {", "\t\t10.244.0.1 : 0x0e9e0007\n", "# 5 elements", "# and 2 more", "10.96.0.0-10.96.255.255", "counter guard_dropped # 0 packets",
		"# a rule that is not Egret's", "chain stranger", "\tset permit4 ", "\t\t10.10.0.11\n", "ct mark & 0xffff0000 == 0x0e9e0000", "type nat",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in\n%s", want, got)
		}
	}
	if strings.Contains(got, "10.244.0.4 :") || strings.Contains(got, "made with other settings") {
		t.Errorf("more than 3 elements, or rules of its own that it does not know:\n%s", got)
	}
}
