package conntrack

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// fill makes entries, one for each line of arguments for conntrack(8).
func fill(t testing.TB, lines []string) {
	t.Helper()
	file := t.TempDir() + "/entries"
	if err := os.WriteFile(file, []byte("-A -t 600 "+strings.Join(lines, "\n-A -t 600 ")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	netns.Run(t, "conntrack -R "+file)
}

// others are n connections that nobody asks for.
func others(n int) (lines []string) {
	for i := range n {
		lines = append(lines, fmt.Sprintf("-s 10.9.%d.%d -d 192.0.2.1 -p udp --sport %d --dport 53 -m %d", i/250%250, i%250, 1000+i/62500, i%7))
	}
	return lines
}

// listed returns what the kernel lists for a filter.
func listed(t testing.TB, f Filter) (all []Connection) {
	t.Helper()
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, family := range f.families() {
		if err := (table{c}).list(family, f, func(c Flow, _ []byte) { all = append(all, c.Connection) }); err != nil {
			t.Fatal(err)
		}
	}
	return all
}

func TestTheKernelListsWhatAFilterMeansAlone(t *testing.T) {
	netns.Enter(t)
	a := netip.MustParseAddr
	tagged := egress.ID(5).ConnMark()
	fill(t, append(others(1000),
		fmt.Sprintf("-s 10.0.0.1 -d 192.0.2.7 -p udp --sport 1 --dport 2 --src-nat 192.0.2.9 -m %d", tagged),
		fmt.Sprintf("-s 10.0.0.1 -d 192.0.2.8 -p udp --sport 1 --dport 2 -m %d", egress.ID(6).ConnMark()),
		"-s 192.0.2.9 -d 192.0.2.9 -p udp --sport 1 --dport 2",
		"-s fd00::1 -d 2001:db8::1 -p udp --sport 1 --dport 2 --src-nat fd00::9",
	))
	for _, tt := range []struct {
		name string
		f    Filter
		want string
	}{
		{"the source", Filter{Source: a("10.0.0.1")}, "192.0.2.7 192.0.2.8"},
		{"the source and the mark", Filter{Source: a("10.0.0.1"), Mark: tagged, Mask: ^egress.Mark(0)}, "192.0.2.7"},
		{"the destination", Filter{Destination: a("192.0.2.8")}, "192.0.2.8"},
		{"whom the destination answers", Filter{Translated: a("192.0.2.9")}, "192.0.2.7 192.0.2.9"},
		{"a part of the mark", Filter{Mark: egress.ConnTag, Mask: egress.ConnTagMask}, "192.0.2.7 192.0.2.8"},
		{"nothing that there is", Filter{Source: a("10.0.0.2")}, ""},
	} {
		var got []string
		for _, c := range listed(t, tt.f) {
			got = append(got, c.Destination.String())
		}
		if slices.Sort(got); strings.Join(got, " ") != tt.want {
			t.Errorf("%s: the kernel lists %v, want %s", tt.name, got, tt.want)
		}
	}
}

// One zone is the loop's: an entry is deleted by what the kernel says of it, its zone and its number.
func TestDeleteByFiltersDeletesInEveryZoneAndNothingElse(t *testing.T) {
	netns.Enter(t)
	fill(t, append(others(100),
		"-s 10.0.0.1 -d 192.0.2.7 -p udp --sport 1 --dport 2",
		"-s 10.0.0.1 -d 192.0.2.7 -p udp --sport 1 --dport 2 --src-nat 192.0.2.9 --orig-zone 3742",
		"-s 10.0.0.3 -d 192.0.2.7 -p udp --sport 1 --dport 2",
		"-s fd00::1 -d 2001:db8::1 -p udp --sport 1 --dport 2"))
	filters := []Filter{{Source: netip.MustParseAddr("10.0.0.1")}, {Source: netip.MustParseAddr("fd00::1")}, {Source: netip.MustParseAddr("10.0.0.3")}}
	asked := 0
	if err := Delete(func(c Connection) bool { asked++; return c.Source != netip.MustParseAddr("10.0.0.3") }, filters...); err != nil {
		t.Fatal(err)
	}
	if asked != 4 {
		t.Errorf("asked %d times, want 4", asked)
	}
	if left := listed(t, Filter{}); len(left) != 101 {
		t.Errorf("%d entries are left, want 101", len(left))
	}
	// More of them than are worth a listing each.
	for i := range mostFilters {
		filters = append(filters, Filter{Source: netip.MustParseAddr(fmt.Sprintf("10.8.0.%d", i))})
	}
	asked = 0
	if err := Delete(func(Connection) bool { asked++; return true }, filters...); err != nil || asked != 1 {
		t.Errorf("asked %d times, error %v; want once", asked, err)
	}
	if left := listed(t, Filter{}); len(left) != 100 {
		t.Errorf("%d entries are left, want 100", len(left))
	}
}

// BenchmarkDelete looks for the three connections of one pod beside many of others.
func BenchmarkDelete(b *testing.B) {
	for _, entries := range []int{1000, 100_000, 200_000} {
		for _, how := range []string{"whole", "filter"} {
			b.Run(fmt.Sprintf("entries=%d/%s", entries, how), func(b *testing.B) {
				netns.Enter(b)
				pod := netip.MustParseAddr("10.0.0.1")
				fill(b, append(others(entries), "-s 10.0.0.1 -d 192.0.2.7 -p udp --sport 1 --dport 2"))
				var filters []Filter
				if how == "filter" {
					filters = append(filters, Filter{Source: pod})
				}
				found := 0
				before := cpu(b)
				for b.Loop() {
					if err := Delete(func(c Connection) bool {
						if c.Source == pod {
							found++
						}
						return false
					}, filters...); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(cpu(b)-before)/float64(b.N), "cpu-ns/op")
				if found == 0 {
					b.Error("the pod's connection is not found")
				}
			})
		}
	}
}

// cpu returns how much CPU this process has taken.
func cpu(b *testing.B) int64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return u.Utime.Nano() + u.Stime.Nano()
}

func TestCountByIDCountsConnectionsOfAnEgressIP(t *testing.T) {
	netns.Enter(t)
	lines := others(5)
	for i := range 3 {
		lines = append(lines, fmt.Sprintf("-s 10.244.0.%d -d 192.0.2.7 -p udp --sport 1000 --dport 53 -m %d", i+1, egress.ID(7).ConnMark()))
	}
	fill(t, append(lines, fmt.Sprintf("-s fd44::1 -d 2001:db8::7 -p udp --sport 1000 --dport 53 -m %d", egress.ID(9).ConnMark())))
	got, err := CountByID(func(Connection) bool { return true })
	if err != nil || len(got) != 2 || got[7] != 3 || got[9] != 1 {
		t.Errorf("got %v, %v; want 3 of id 7 and 1 of id 9", got, err)
	}
	first := netip.MustParseAddr("10.244.0.1")
	got, err = CountByID(func(c Connection) bool { return c.Source == first })
	if err != nil || len(got) != 1 || got[7] != 1 {
		t.Errorf("of one source: got %v, %v; want 1 of id 7", got, err)
	}
}

// A question of what the kernel chooses by itself is a look at the whole table, as a listing is.
func TestWhetherTheKernelChoosesByAddressIsAskedOnceThereIsAConnectionToTellBy(t *testing.T) {
	netns.Enter(t)
	forget := func() { choice.known = nil }
	forget()
	t.Cleanup(forget)
	var filters = map[byte]Filter{
		unix.AF_INET: {Source: netip.MustParseAddr("10.0.0.1")}, unix.AF_INET6: {Source: netip.MustParseAddr("fd00::1")},
	}
	for family, f := range filters {
		if list, err := listings(family, []Filter{f}); err != nil || len(list) > 0 {
			t.Errorf("family %d, an empty table: %v, %v is listed, want nothing", family, list, err)
		}
		if _, known := choice.known[family]; known {
			t.Errorf("family %d: an empty table told whether the kernel chooses", family)
		}
	}
	fill(t, append(others(100), "-s fd00::1 -d 2001:db8::1 -p udp --sport 1 --dport 2"))
	for family, f := range filters {
		list, err := listings(family, []Filter{f})
		chooses, known := choice.known[family]
		if err != nil || !known || len(list) != 1 || (list[0] == f) != chooses {
			t.Errorf("family %d: %v, %v is listed, known %t: %t", family, list, err, known, chooses)
		}
	}
	if !choice.known[unix.AF_INET] {
		t.Error("the kernel is not known to choose by addresses of IPv4, as Linux does since 5.8")
	}
}
