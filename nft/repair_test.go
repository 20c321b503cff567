package nft

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// foreign is a table of someone else, with a set that holds something.
const foreign = `table inet foreign {
	set pod4 { type ipv4_addr; elements = { 10.244.1.2 } }
	chain prerouting { type filter hook prerouting priority -90; policy accept; ip saddr @pod4 counter; }
}
`

// What someone does by hand to our tables is seen, and mended in one transaction, and nothing else is touched.
func TestDamageByHandIsMended(t *testing.T) {
	var before []string
	for _, tt := range []struct {
		name   string
		damage string
		keeps  bool // permits and counters
	}{
		{"a chain is flushed", "flush chain inet egret steer", true},
		{"the rules of a table are flushed", "flush table arp egret", true},
		{"a rule is put first", "insert rule inet egret guard accept", true},
		{"a rule is put last", "add rule inet egret classify counter", true},
		{"a rule is put into the arp table", "insert rule arp egret out accept", true},
		{"rules of ours are written again by hand", "flush chain inet egret steer; add rule inet egret steer meta mark set ip saddr map @pod4; add rule inet egret steer meta mark set ip6 saddr map @pod6; " +
			"add rule inet egret steer meta mark set meta mark . ct mark map @nexthop accept; add rule inet egret steer counter name no_nexthop drop", true},
		{"an element is deleted", "delete element inet egret pod4 { 10.244.1.2 }", true},
		{"an element is changed", "delete element inet egret nexthop { 0x0e9e0005 . 0x0e9e0005 }; add element inet egret nexthop { 0x0e9e0005 . 0x0e9e0005 : 0x2009 }", true},
		{"an element is added", "add element inet egret egressip4 { 10.10.0.77 }", true},
		{"an exception is added", "add element inet egret except4 { 1.0.0.0-1.0.0.9 }", true},
		{"a set is flushed", "flush set inet egret except4; flush set inet egret node4", true},
		{"a map is flushed", "flush map inet egret pod4", true},
		{"a table sleeps", "add table inet egret { flags dormant; }", true},
		{"a chain is added, and called", "add chain inet egret extra; add rule inet egret extra accept; insert rule inet egret guard jump extra", true},
		{"a hooked chain is added", "add chain inet egret extra { type filter hook forward priority 5; policy drop; }", true},
		{"a set is added, and used", "add set inet egret extra { type mark; }; insert rule inet egret guard meta mark @extra accept", true},
		{"a verdict map holds on to a chain", "add chain inet egret extra; add map inet egret jumps { type mark : verdict; elements = { 1 : jump extra }; }", true},
		{"objects are added", "add counter inet egret extra; add quota inet egret much { over 10 mbytes; }", true},
		{"a chain is called elsewhere", "flush table inet egret; delete chain inet egret guard; add chain inet egret guard { type filter hook postrouting priority 99; policy accept; }", true},
		{"a chain drops by policy", "add chain inet egret guard { policy drop; }", true},
		{"a chain is deleted", "flush table inet egret; delete chain inet egret invalid", true},
		{"a set is of another type", "flush table inet egret; delete map inet egret pod4; add map inet egret pod4 { type ipv4_addr : ipv4_addr; elements = { 1.1.1.1 : 2.2.2.2 }; }", true},
		{"a set is no map", "flush table inet egret; delete map inet egret hosted; add set inet egret hosted { type mark; }", true},
		{"permits are a set of another size", "flush table arp egret; delete set arp egret permit4; add set arp egret permit4 { type ipv4_addr; size 7; }", false},
		{"what renews permits is flushed", "flush chain arp egret renew", true},
		{"the clock of permits is a set without time", "flush table arp egret; delete set arp egret alive; add set arp egret alive { type ether_type; }", false},
		{"a counter is deleted", "flush table inet egret; delete counter inet egret no_nexthop", true},
		{"a counter is a quota", "flush table inet egret; delete counter inet egret no_nexthop; add quota inet egret no_nexthop { over 10 mbytes; }", true},
		{"a limit is of another rate", "delete element inet egret bandwidth { 0x0e9e0006 }; delete limit inet egret egress_6; add limit inet egret egress_6 { rate over 7 bytes/second; }; add element inet egret bandwidth { 0x0e9e0006 : \"egress_6\" }", true},
		{"a limit is not referred to", "flush map inet egret bandwidth", true},
		{"an element refers to another limit", "add limit inet egret other { rate over 7 bytes/second; }; delete element inet egret bandwidth { 0x0e9e0006 }; add element inet egret bandwidth { 0x0e9e0006 : \"other\" }", true},
		{"one table is deleted", "delete table inet egret", false},
		{"the other table is deleted", "delete table arp egret", false},
		{"the ruleset is flushed", "flush ruleset;" + foreign, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tables := openShared(t)
			want := parseState(t, "mtu 1450\nrenewal 500ms 10s\npod 10.244.1.2 5\nnexthop 5 0x3ffe\nhosted 6 10.10.0.8 0x3fff 1250000 250000\naddressguard 10.10.0.8\nexcept 10.244.0.0/16\nnode 10.10.0.102")
			nft(t, foreign)
			reach(t, tables, want)
			permit := Permit{IP: netip.MustParseAddr("10.10.0.8"), Answer: true}
			if err := tables.Permit([]Permit{permit}, time.Hour); err != nil {
				t.Fatal(err)
			}
			if before == nil { // all begin alike
				before = beside(t)
			}

			nft(t, strings.ReplaceAll(tt.damage, "; ", "\n"))
			have := observe(t, tables)
			c := Diff(have, want)
			if c.Empty() {
				t.Fatal("the damage was not seen")
			}
			reach(t, tables, want)
			if !tt.keeps {
				if err := tables.Permit([]Permit{permit}, time.Hour); err != nil {
					t.Fatal(err)
				}
			}
			// Sets, counters and chains that were made anew come last.
			if diff := cmp.Diff(before, beside(t)); diff != "" {
				t.Errorf("after the repair (-before +after):\n%safter:\n%s", diff, c)
			}
		})
	}
}

// beside returns the parts of our tables, and the foreign one.
func beside(t *testing.T) []string {
	t.Helper()
	ours, theirs, _ := strings.Cut(listTables(t, "inet egret", "arp egret", "netdev egret", "inet foreign"), "table inet foreign ")
	return append(blocks(ours), theirs)
}

var anyBlock = regexp.MustCompile(`(?ms)^\t(set|map|counter|limit|chain) .*?^\t}\n`)

// blocks returns the sets, maps, counters, limits and chains of a listing, sorted.
func blocks(listed string) []string {
	b := anyBlock.FindAllString(listed, -1)
	slices.Sort(b)
	return b
}

func TestASteadyStateIsNotWritten(t *testing.T) {
	tables := open(t)
	reach(t, tables, large(100))
	before, err := tables.read.generation()
	if err != nil {
		t.Fatal(err)
	}
	reach(t, tables, large(100))
	if after, err := tables.read.generation(); err != nil || after != before {
		t.Errorf("generation %d became %d, %v", before, after, err)
	}
}

func TestADeletedRuleIsNamed(t *testing.T) {
	tables := openShared(t)
	reach(t, tables, State{})
	nft(t, "flush chain inet egret steer")
	c := Diff(observe(t, tables), State{})
	if diff := cmp.Diff([]string{"inet egret: chain steer: 0 of 6 rules"}, c.Repairs); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if strings.Contains(c.String(), "arp egret") {
		t.Errorf("the other table is written too:\n%s", c)
	}
}

func TestApplyingTwiceIsHarmless(t *testing.T) {
	tables := open(t)
	want := large(20)
	c := Diff(observe(t, tables), want)
	for range 2 {
		if err := tables.Apply(c); err != nil {
			t.Fatal(err)
		}
	}
	if c := Diff(observe(t, tables), want); !c.Empty() {
		t.Errorf("the second Apply did harm, mended by:\n%s", c)
	}
}

func TestATransactionThatFitsNoMoreWritesNothing(t *testing.T) {
	tables := openShared(t)
	want := large(3)
	reach(t, tables, want)
	c := Diff(observe(t, tables), large(2))
	nft(t, "delete element inet egret pod4 { 10.244.0.3 }")
	before := list(t)
	err := tables.Apply(c)
	if !errors.Is(err, ErrStale) || !strings.Contains(err.Error(), "delete element inet egret pod4 { 10.244.0.3 }") {
		t.Errorf("got error %v, want ErrStale and the element", err)
	}
	if diff := cmp.Diff(before, list(t)); diff != "" {
		t.Errorf("something was written (-before +after):\n%s", diff)
	}
	reach(t, tables, large(2)) // the socket is in order
}

// An error never causes a delete. Which pods stay says who has read the records.
func TestKeepDeletesNothingButPods(t *testing.T) {
	tables := open(t)
	reach(t, tables, parseState(t, "pod 10.244.1.2 5\npod 10.244.1.3 5\npod fd44::1 6\nnexthop 5 0x3ffe\nexcept 10.96.0.0/16"))
	want := parseState(t, "pod 10.244.1.3 7\npod 10.244.1.4 5")
	want.Keep = true
	c := reach(t, tables, want)
	lines := "delete element inet egret selected4 { 10.244.1.2 }\nadd element inet egret selected4 { 10.244.1.4 }\n" +
		"delete element inet egret pod4 { 10.244.1.2, 10.244.1.3 }\nadd element inet egret pod4 { 10.244.1.3 : 0x0e9e0007, 10.244.1.4 : 0x0e9e0005 }\n" +
		"delete element inet egret selected6 { fd44::1 }\ndelete element inet egret pod6 { fd44::1 }\n"
	if diff := cmp.Diff(lines, c.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	pods := map[netip.Addr]egress.ID{netip.MustParseAddr("10.244.1.3"): 7, netip.MustParseAddr("10.244.1.4"): 5}
	if diff := cmp.Diff(pods, observe(t, tables).Pods(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("pods (-want +got):\n%s", diff)
	}
}

// A node is gone whose pod CIDR is in the middle of others, or at their end: the kernel has one range of all.
func TestKeepUnitesRangesThatOverlap(t *testing.T) {
	tables := open(t)
	reach(t, tables, parseState(t, "except 10.244.0.0/22\nexcept fd44::/62\nexcept 10.96.0.1/32\nexcept 10.96.0.3/32"))
	want := parseState(t, "except 10.244.1.0/24\nexcept 10.244.3.0/24\nexcept 10.244.4.0/24\nexcept fd44:0:0:1::/64\nexcept 10.96.0.1/32\nexcept 10.96.0.2/32\nexcept 10.96.0.3/32")
	want.Keep = true
	reach(t, tables, want)
	for _, line := range []string{"10.244.0.0-10.244.4.255", "10.96.0.1-10.96.0.3", "fd44::/62"} {
		if all := list(t); !strings.Contains(all, line) {
			t.Errorf("%s is not in\n%s", line, all)
		}
	}
}

func TestUnhostedAreTheIPsThatGo(t *testing.T) {
	tables := open(t)
	reach(t, tables, parseState(t, "hosted 5 10.10.0.5 0x3fff\nhosted 6 fd10::6 0x3fff\nhosted 7 10.10.0.7 0x3fff"))
	next := parseState(t, "hosted 5 10.10.0.5 0x3ffe\nhosted 8 10.10.0.8 0x3fff")
	want := []netip.Addr{netip.MustParseAddr("10.10.0.7"), netip.MustParseAddr("fd10::6")}
	if diff := cmp.Diff(want, Diff(observe(t, tables), next).Unhosted, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if next.Keep = true; len(Diff(observe(t, tables), next).Unhosted) > 0 {
		t.Error("what is kept counts as gone")
	}
}

func TestReselectedAreThePodsWithAnotherIDOrNone(t *testing.T) {
	tables := open(t)
	reach(t, tables, parseState(t, "pod 10.244.1.2 5\npod 10.244.1.3 5\npod 10.244.1.4 5"))
	next := parseState(t, "pod 10.244.1.2 5\npod 10.244.1.3 6\npod fd44::1 7")
	for _, keep := range []bool{false, true} {
		next.Keep = keep
		if got, want := fmt.Sprint(Diff(observe(t, tables), next).Reselected), "[10.244.1.3 10.244.1.4 fd44::1]"; got != want {
			t.Errorf("what is not known is kept %t: reselected %s, want %s", keep, got, want)
		}
	}
}

// A read during other people's commits is of one moment: here, all of one state or all of the other.
func TestADumpIsNeverTorn(t *testing.T) {
	tables := openShared(t)
	states := []State{large(1500), large(1500)}
	states[1].Pods, states[1].NextHops = map[netip.Addr]egress.ID{}, map[egress.ID]egress.Mark{}
	for ip := range states[0].Pods {
		states[1].Pods[ip] = 77
	}
	var all []map[string]elements
	var steps [2]Changes
	for i := range states {
		reach(t, tables, states[i])
		have := observe(t, tables)
		all = append(all, have.tables[0].elements)
		steps[i] = Diff(have, states[1-i])
	}
	// The kernel holds states[1].
	other := openHere(t, Config{Shared: true})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 1; ; i = 1 - i {
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(rand.IntN(60)) * time.Millisecond):
			}
			if err := other.Apply(steps[i]); err != nil {
				t.Error(err)
				return
			}
		}
	})
	whole := map[int]int{}
	for deadline := time.Now().Add(2 * time.Second); time.Now().Before(deadline) && (whole[0] < 5 || whole[1] < 5); {
		o, err := tables.Observe()
		if errors.Is(err, errChanged) {
			continue // more commits than a busy machine can read between
		}
		if err != nil {
			t.Error(err)
			break
		}
		i := slices.IndexFunc(all, func(e map[string]elements) bool {
			return maps.EqualFunc(e, o.tables[0].elements, func(a, b elements) bool { return maps.Equal(a, b) })
		})
		if i < 0 {
			t.Error("a read of neither state")
			break
		}
		whole[i]++
	}
	close(stop)
	wg.Wait()
	t.Logf("whole reads of each state: %v", whole)
}

// The kernel may take a chain of netdev away with its link, and that is no commit. Newer ones keep it for the next link
// of the name.
func TestAChainThatWentWithItsLinkIsMissed(t *testing.T) {
	tables := open(t)
	netns.Run(t, "ip link add lan0 type veth peer name lan1")
	want := State{Carriers: map[string]Carrier{"lan0": {MAC: [6]byte{2, 0, 0, 0, 0, 1}, IPs: []netip.Addr{netip.MustParseAddr("10.10.0.77")}}}}
	reach(t, tables, want)
	observe(t, tables)
	netns.Run(t, "ip link del lan0")
	netns.Run(t, "ip link add lan0 type veth peer name lan1")
	reach(t, tables, want)
	netns.Run(t, "nft list chain netdev egret answer_lan0")
}
