package nft

import (
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/internal/need"
	"github.com/egret-project/egret/internal/netns"
)

// owned returns Tables in a namespace of the test's own, which own their tables. On a kernel that does not let them it
// skips the test: there the tables must not be owned at all, as they would go with the agent.
func owned(t testing.TB) *Tables {
	t.Helper()
	tables := open(t)
	if tables.socket == 0 {
		reach(t, tables, State{})
		for _, o := range observe(t, tables).tables {
			if o.flags != 0 {
				t.Errorf("flags 0x%x on a kernel without tables that persist", o.flags)
			}
		}
	}
	need.OwnedTables(t, tables.socket != 0)
	return tables
}

func TestOthersCanNeitherFlushNorChangeTheTables(t *testing.T) {
	tables := owned(t)
	want := parseState(t, "mtu 1450\npod 10.244.1.2 5\nnexthop 5 0x3ffe\nhosted 6 10.10.0.8 0x3fff\naddressguard 10.10.0.8")
	reach(t, tables, want)
	if err := tables.Permit([]Permit{{ip4, true}}, time.Hour); err != nil {
		t.Fatal(err)
	}
	before := list(t)
	for _, attempt := range []string{
		"delete table inet egret", "delete table arp egret", "delete table netdev egret", "flush table inet egret", "flush chain inet egret guard",
		"insert rule inet egret permitted accept", "add element inet egret except4 { 203.0.113.0/24 }", "flush set inet egret permit4",
		"add table inet egret { flags dormant; }", "add chain inet egret x { type filter hook forward priority 5; policy drop; }",
	} {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(attempt)
		if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "not permitted") && !strings.Contains(string(out), "not supported") {
			t.Errorf("%s: %v\n%s", attempt, err, out)
		}
	}
	nft(t, foreign)
	nft(t, "flush ruleset")
	if diff := cmp.Diff(before, list(t)); diff != "" {
		t.Errorf("the tables changed (-before +after):\n%s", diff)
	}
	if out := netns.Run(t, "nft list tables"); strings.Contains(out, "foreign") {
		t.Errorf("nothing was flushed:\n%s", out)
	}
	if left := permits(t, tables); len(left) != 1 {
		t.Errorf("permits %v, want one", left)
	}
	reach(t, tables, parseState(t, "pod 10.244.1.2 6")) // the owner can
}

// An agent that dies leaves its tables to the next one, as they are.
func TestTablesOfADeadAgentAreTakenOver(t *testing.T) {
	tables := owned(t)
	want := parseState(t, "pod 10.244.1.2 5\nnexthop 5 0x3ffe\nhosted 6 10.10.0.8 0x3fff\naddressguard 10.10.0.8")
	reach(t, tables, want)
	if err := tables.Permit([]Permit{{ip4, true}}, time.Hour); err != nil {
		t.Fatal(err)
	}
	before := blocks(list(t))
	next := openHere(t, Config{})
	if err := next.Permit([]Permit{{ip4, true}}, time.Hour); !errors.Is(err, unix.EPERM) {
		t.Errorf("a second agent beside the first: %v, want EPERM", err)
	}
	if err := next.Delete(); !errors.Is(err, unix.EPERM) {
		t.Errorf("a cleanup beside the agent: %v, want EPERM", err)
	}
	if err := tables.write.nl.Close(); err != nil { // as when it is killed
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, blocks(list(t))); diff != "" {
		t.Errorf("left behind (-before +after):\n%s", diff)
	}
	if left := permits(t, next); len(left) != 1 {
		t.Errorf("permits %v, want that of the dead agent", left)
	}
	if err := next.Permit([]Permit{{ip4, true}}, 2*time.Hour); err != nil {
		t.Errorf("a permit before the first Apply: %v", err)
	}
	c := reach(t, next, want)
	lines := "add table inet egret { flags owner,persist; }\nadd table arp egret { flags owner,persist; }\nadd table netdev egret { flags owner,persist; }\n"
	if diff := cmp.Diff(lines, c.String()); diff != "" || len(c.Repairs) > 0 {
		t.Errorf("taken over with repairs %v (-want +got):\n%s", c.Repairs, diff)
	}
	nft(t, "flush ruleset")
	if left := permits(t, next); len(left) != 1 {
		t.Errorf("after a flush: permits %v", left)
	}
	tables.write.nl, _ = dial() // for the test's end to close
}

// A version that has other chains, or hooks them elsewhere, comes after one that owned its tables.
func TestTablesOfADeadAgentThatHadOtherChainsAreMended(t *testing.T) {
	tables := owned(t)
	want := parseState(t, "pod 10.244.1.2 5\nnexthop 5 0x3ffe\nhosted 6 10.10.0.8 0x3fff\naddressguard 10.10.0.8")
	reach(t, tables, want)
	before := blocks(list(t))
	for _, was := range []string{
		"flush table inet egret; delete chain inet egret guard; add chain inet egret guard { type filter hook postrouting priority 99; policy accept; }",
		"flush table inet egret; delete chain inet egret input; add chain inet egret former { type filter hook input priority 0; policy accept; }",
	} {
		if err := tables.write.nl.Close(); err != nil {
			t.Fatal(err)
		}
		nft(t, was)
		tables.write.nl, _ = dial() // for the test's end to close
		tables = openHere(t, Config{})
		reach(t, tables, want)
		if diff := cmp.Diff(before, blocks(list(t))); diff != "" {
			t.Errorf("after %s (-want +got):\n%s", was, diff)
		}
	}
}

// A version that owns its tables comes after one that does not, and goes before one.
func TestAnUpgradeOwnsTheTablesAndADowngradeDoesNot(t *testing.T) {
	netns.Enter(t)
	want := parseState(t, "mtu 1450\npod 10.244.1.2 5\nnexthop 5 0x3ffe\nhosted 6 10.10.0.8 0x3fff 1250000 250000\naddressguard 10.10.0.8\nexcept 10.244.0.0/16\nnode 10.10.0.102")
	former := openHere(t, Config{Shared: true})
	reach(t, former, want)
	before := list(t)
	for _, step := range []Config{{}, {Shared: true}, {}} {
		keep := want
		keep.Keep, keep.Pods = true, nil // not all is known at once
		tables := openHere(t, step)
		reach(t, tables, keep)
		reach(t, tables, want)
		if diff := cmp.Diff(blocks(before), blocks(list(t))); diff != "" {
			t.Errorf("%+v (-before +after):\n%s", step, diff)
		}
		flags := uint32(0)
		if tables.socket != 0 {
			flags = flagsOwned
		}
		for _, o := range observe(t, tables).tables {
			if o.flags != flags {
				t.Errorf("%+v: flags 0x%x, want 0x%x", step, o.flags, flags)
			}
		}
		if err := tables.write.nl.Close(); err != nil {
			t.Fatal(err)
		}
		tables.write.nl, _ = dial() // for the test's end to close
	}
	if err := former.Delete(); err != nil {
		t.Errorf("a cleanup by a version that owns no tables: %v", err)
	}
}

func TestTablesThatAnotherProgramOwnsAreReported(t *testing.T) {
	tables := owned(t)
	other, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	w := writer{nl: other}
	theirs := inetTable(State{})
	theirs.flags = flagOwner
	if err := w.commit([]op{theirs.addTable()}); err != nil {
		t.Fatal(err)
	}
	err = tables.Apply(Diff(observe(t, tables), State{}))
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "table inet egret") {
		t.Errorf("got %v, want EPERM and the table", err)
	}
}

// Somebody flushes all nftables and loads the CNI's again, as `systemctl restart nftables` does, while a pod opens
// connections as fast as it can. That the witness sees what gets through, the tables that others may flush show.
func TestAFlushOfOthersLetsNoPacketOutWithAnotherSource(t *testing.T) {
	for _, f := range bothSides {
		for name, shared := range map[string]bool{"owned": false, "shared": true} {
			t.Run(f.pod+"/"+name, func(t *testing.T) { testFlushes(t, f, shared) })
		}
	}
}

func testFlushes(t *testing.T, f sides, shared bool) {
	tables := openShared(t)
	if !shared {
		tables = openHere(t, Config{})
		need.OwnedTables(t, tables.socket != 0)
	}
	ext, p := outside(t), pod(t)
	f.addEgressIP(t)
	var witness net.PacketConn
	ext.do(func() (err error) {
		witness, err = net.ListenPacket("udp", net.JoinHostPort(f.server, "7003"))
		return err
	})
	t.Cleanup(func() { witness.Close() })
	reach(t, tables, parseState(t, f.base()+"pod "+f.pod+" 5\nnexthop 5 0x3fff\nhosted 5 "+f.egress+" 0x3fff\n"))
	if err := tables.Permit([]Permit{{f.egressIP(), true}}, time.Hour); err != nil {
		t.Fatal(err)
	}
	seen := make(chan map[string]int)
	go func() {
		sources := map[string]int{}
		for b := make([]byte, 9); ; {
			_, from, err := witness.ReadFrom(b)
			if err != nil {
				seen <- sources
				return
			}
			sources[netip.MustParseAddrPort(from.String()).Addr().Unmap().String()]++
		}
	}()
	restored := "flush ruleset\n" + netns.Run(t, "nft list table inet cni")
	stop, stopped := make(chan struct{}), make(chan error)
	go func() {
		stopped <- netns.Do(p.name, func() error {
			for {
				select {
				case <-stop:
					return nil
				default:
				}
				c, err := net.Dial("udp", net.JoinHostPort(f.server, "7003"))
				if err != nil {
					return err
				}
				_, _ = c.Write([]byte("new")) // what is dropped is not seen
				c.Close()
			}
		})
	}()
	flushes := 50
	if testing.Short() { // emulated machines take two seconds for one
		flushes = 3
	}
	for range flushes {
		nft(t, restored)
	}
	close(stop)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	witness.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
	sources := <-seen
	if !shared && (len(sources) != 1 || sources[f.egress] < 10) || shared && sources[f.node] == 0 {
		t.Errorf("seen outside: %v", sources)
	}
	t.Logf("seen outside: %v", sources)
}
