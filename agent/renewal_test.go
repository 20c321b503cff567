package agent

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/ownership"
	"github.com/egret-project/egret/store"
)

// generation returns how many times anybody has changed the ruleset of the namespace of the calling thread.
func generation(t testing.TB) uint32 {
	t.Helper()
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	m, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETGEN, Flags: netlink.Request},
		Data:   []byte{unix.AF_UNSPEC, 0, 0, 0},
	})
	if err != nil || len(m) != 1 {
		t.Fatal(m, err)
	}
	a, err := netlink.UnmarshalAttributes(m[0].Data[4:])
	if err != nil || len(a) == 0 || a[0].Type != unix.NFTA_GEN_ID {
		t.Fatal(a, err)
	}
	return binary.BigEndian.Uint32(a[0].Data)
}

// renewing runs permits for n IPs of each family, of this length, until the test ends.
func renewing(t *testing.T, n int, length time.Duration) (*permits, *store.Lease) {
	t.Helper()
	client, tables := world(t)
	lease, err := client.Grant(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	var list []nft.Permit
	four, six := netip.MustParseAddr("10.10.1.0"), netip.MustParseAddr("fd10::1:0")
	for range n {
		four, six = four.Next(), six.Next()
		list = append(list, nft.Permit{IP: four, Answer: true}, nft.Permit{IP: six, Answer: true})
	}
	p := permitsOf(t, tables, ownership.Config{Permit: length})
	if err := p.under(lease, list); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- p.run(ctx, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() { stop(); <-done })
	return p, lease
}

// await returns after d.
func await(t testing.TB, d time.Duration) {
	t.Helper()
	select {
	case <-time.After(d):
	case <-t.Context().Done():
	}
}

// A minute of renewals is 480 of them; so are 24 s with permits of 200 ms. A tenth of that is enough to tell none from
// one a renewal.
func TestRenewingPermitsLeavesTheGenerationOfTheRulesetAlone(t *testing.T) {
	p, _ := renewing(t, 3, 200*time.Millisecond)
	before := generation(t)
	await(t, 2400*time.Millisecond)
	if n := generation(t) - before; n > 2 {
		t.Errorf("48 renewals: %d generations, want 2 at most", n)
	}
	left, err := p.tables.Permits()
	if err != nil || len(left) != 6 {
		t.Errorf("permits %v, %v: want 6", left, err)
	}
}

// While a node holds nothing, nothing wakes for its permits.
func TestPermitsThatComeLaterAreRenewed(t *testing.T) {
	client, tables := world(t)
	lease, err := client.Grant(t.Context(), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	const length = 400 * time.Millisecond
	p := permitsOf(t, tables, ownership.Config{Permit: length})
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- p.run(ctx, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() { stop(); <-done })
	rests := func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return p.resting
	}
	for range 2 { // they come, go, and come again
		for !rests() {
			await(t, time.Millisecond)
		}
		list := []nft.Permit{{IP: netip.MustParseAddr("10.10.1.1"), Answer: true}}
		if err := p.under(lease, list); err != nil {
			t.Fatal(err)
		}
		for range 20 {
			await(t, length/10)
			if left, err := p.tables.Permits(); err != nil || len(left) != 1 {
				t.Errorf("permits %v, %v: want 1", left, err)
			}
		}
		if rests() {
			t.Error("nobody renews the permits")
		}
		if err := p.withdraw(nil); err != nil {
			t.Fatal(err)
		}
	}
}

// Where nothing renews them, as with a damaged table until the repair, or without lo, permits go on by commits.
func TestPermitsGoOnByCommitsWhereNothingElseRenewsThem(t *testing.T) {
	for name, breaks := range map[string]func(*testing.T, *nft.Tables){
		"the rules are gone": func(t *testing.T, tables *nft.Tables) { program(t, tables, nft.State{}) },
		"lo is down":         func(t *testing.T, _ *nft.Tables) { netns.Run(t, "ip link set lo down") },
	} {
		t.Run(name, func(t *testing.T) {
			p, _ := renewing(t, 1, 200*time.Millisecond)
			breaks(t, p.tables)
			for range 20 {
				await(t, 50*time.Millisecond)
				if left, err := p.tables.Permits(); err != nil || len(left) != 2 {
					t.Errorf("permits %v, %v: want 2", left, err)
				}
			}
		})
	}
}

// A transaction of another program, as a firewall's of many elements, holds up who reads which permits there are, and
// no renewal meanwhile.
func TestRenewalsWaitForNoCommitOfOthers(t *testing.T) {
	p, _ := renewing(t, 1, 500*time.Millisecond)
	list := make([]nft.Permit, 0, 2)
	for _, have := range p.machine.Permits() {
		list = append(list, nft.Permit(have))
	}
	var b strings.Builder
	b.WriteString("add table inet other\nflush table inet other\nadd set inet other s { type ipv4_addr; size 1000000; }\nadd element inet other s {")
	for i := range 400_000 {
		fmt.Fprintf(&b, " 172.%d.%d.%d,", 16+i>>16, i>>8&0xff, i&0xff)
	}
	b.WriteString(" 192.0.2.1 }\n")
	others := exec.Command("nft", "-f", "-")
	others.Stdin = strings.NewReader(b.String())
	if err := others.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- others.Wait() }()
	longest := func(what func() error) (stop func() time.Duration) {
		ended, most := make(chan struct{}), make(chan time.Duration)
		go func() {
			var long time.Duration
			for {
				select {
				case <-ended:
					most <- long
					return
				default:
				}
				began := time.Now()
				if err := what(); err != nil {
					t.Error(err)
				}
				long = max(long, time.Since(began))
				time.Sleep(5 * time.Millisecond)
			}
		}()
		return func() time.Duration { close(ended); return <-most }
	}
	granted, renewed := longest(func() error { return p.grant(list) }), longest(p.renew)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	grant, renewal := granted(), renewed()
	t.Logf("the longest pass waited for %v, the longest renewal took %v", grant, renewal)
	if grant < 100*time.Millisecond {
		t.Errorf("a pass waited for %v at most: want more, to tell that from what others' work costs", grant)
	}
	if renewal > grant/2 {
		t.Errorf("a renewal took %v while a pass waited for %v", renewal, grant)
	}
}

// kube-proxy and Felix read all rules at one generation, and start again when it has changed. So does nft.
func TestIptablesSaveIsNotSlowedDownByRenewals(t *testing.T) {
	const rules = 30000
	var b strings.Builder
	b.WriteString("*filter\n:OTHERS - [0:0]\n")
	for i := range rules {
		fmt.Fprintf(&b, "-A OTHERS -s 172.16.%d.%d/32 -p tcp -m tcp --dport %d -j ACCEPT\n", i>>8&0xff, i&0xff, 1+i)
	}
	b.WriteString("COMMIT\n")
	load := func() {
		t.Helper()
		c := exec.Command("iptables-nft-restore", "-n")
		c.Stdin = strings.NewReader(b.String())
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("iptables-nft-restore: %v\n%s", err, out)
		}
	}
	readers := map[string]string{"iptables-nft-save -t filter": "\n-A ", "nft list ruleset": " counter packets "}
	took := func(reader string) time.Duration {
		t.Helper()
		ctx, stop := context.WithTimeout(t.Context(), 30*time.Second)
		defer stop()
		f := strings.Fields(reader)
		c := exec.CommandContext(ctx, f[0], f[1:]...)
		out, err := c.Output()
		if err != nil {
			t.Fatalf("%s: %v", reader, err)
		}
		if n := bytes.Count(out, []byte(readers[reader])); n < rules {
			t.Fatalf("%s: %d rules, want %d", reader, n, rules)
		}
		// to read again takes that, and others' work does not
		return c.ProcessState.UserTime() + c.ProcessState.SystemTime()
	}
	renewing(t, 3, 500*time.Millisecond)
	load()
	with := netns.Current(t)
	netns.Enter(t)
	load()
	without := netns.Current(t)
	// The least of each counts, and they take turns, so that both have had the same machine.
	for reader := range readers {
		best := map[int]time.Duration{without: time.Hour, with: time.Hour}
		slow := func() bool { return best[with] > best[without]*12/10 }
		for n := 0; n < 4 || n < 15 && slow(); n++ {
			for ns := range best {
				netns.Switch(t, ns)
				best[ns] = min(best[ns], took(reader))
			}
		}
		t.Logf("%s, %d rules of others: %v without Egret, %v with it", reader, rules, best[without], best[with])
		if slow() {
			t.Errorf("%s of %d rules of others takes %v, and %v without Egret: want 1.2 times that at most", reader, rules, best[with], best[without])
		}
	}
}
