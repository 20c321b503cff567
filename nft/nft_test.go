package nft

import (
	"bufio"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
)

// open returns Tables in a network namespace of the test's own.
func open(t testing.TB) *Tables {
	t.Helper()
	netns.Enter(t)
	return openHere(t, Config{})
}

// openShared returns Tables in a network namespace of the test's own that others may write to.
func openShared(t testing.TB) *Tables {
	t.Helper()
	netns.Enter(t)
	return openHere(t, Config{Shared: true})
}

func mapPut[K comparable, V any](m map[K]V, k K, v V) map[K]V {
	if m == nil {
		m = map[K]V{}
	}
	m[k] = v
	return m
}

// openHere returns Tables in the namespace of the calling thread.
func openHere(t testing.TB, cfg Config) *Tables {
	t.Helper()
	tables, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tables.Close(); err != nil {
			t.Error(err)
		}
	})
	return tables
}

func observe(t testing.TB, tables *Tables) Observed {
	t.Helper()
	o, err := tables.Observe()
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// reach applies what is missing to want, and checks that nothing is missing then.
func reach(t testing.TB, tables *Tables, want State) Changes {
	t.Helper()
	c := Diff(observe(t, tables), want)
	if err := tables.Apply(c); err != nil {
		t.Fatal(err)
	}
	if again := Diff(observe(t, tables), want); !again.Empty() {
		t.Fatalf("after Apply there is still a difference:\n%s", again)
	}
	return c
}

// volatile is what nft prints and no State decides.
var volatile = regexp.MustCompile(`packets \d+ bytes \d+| expires \w+|\s+# handle \d+`)

// header is how nft begins to print a table: its family and its name.
var header = regexp.MustCompile(`(?m)^table (\w+ \S+) .*\n`)

// list prints our tables as nft has them, in the namespace of the calling thread.
func list(t testing.TB) string {
	t.Helper()
	return listTables(t, "inet egret", "arp egret", "netdev egret")
}

// listTables prints these tables, in this order. It starts one process: on an emulated machine that is what takes long.
// nft 1.0 cannot be asked for more than one table, and fewer than all.
func listTables(t testing.TB, ids ...string) string {
	t.Helper()
	printed := netns.Run(t, "nft list ruleset")
	starts := header.FindAllStringSubmatchIndex(printed, -1)
	tables := map[string]string{}
	for i, at := range starts {
		end := len(printed)
		if i+1 < len(starts) {
			end = starts[i+1][0]
		}
		tables[printed[at[2]:at[3]]] = printed[at[0]:end]
	}
	var b strings.Builder
	for _, id := range ids {
		table, is := tables[id]
		if !is {
			t.Fatalf("there is no table %s:\n%s", id, printed)
		}
		b.WriteString(table)
	}
	return volatile.ReplaceAllString(b.String(), "")
}

// nft runs a command of nft(8), which may hold spaces and quotes.
func nft(t testing.TB, script string) string {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(script)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("nft: %v\n%s\n%s", err, script, out)
	}
	return string(out)
}

// goldens returns the states of testdata, by name.
func goldens(t testing.TB) map[string]State {
	t.Helper()
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("testdata: %d goldens, %v", len(files), err)
	}
	all := map[string]State{}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimSuffix(filepath.Base(f), ".txtar")] = parseState(t, section(b, "state"))
	}
	return all
}

// parseState reads a State: a line for each thing, its fields in the order of the comments.
func parseState(t testing.TB, text string) State {
	t.Helper()
	s := State{Pods: map[netip.Addr]egress.ID{}, NextHops: map[egress.ID]egress.Mark{}, Hosted: map[egress.ID]Hosted{}}
	addr := netip.MustParseAddr
	number := func(f string) int {
		n, err := strconv.ParseInt(f, 0, 32)
		if err != nil {
			t.Fatalf("state: %v", err)
		}
		return int(n)
	}
	for sc := bufio.NewScanner(strings.NewReader(text)); sc.Scan(); {
		f := strings.Fields(sc.Text())
		if len(f) == 0 {
			continue
		}
		switch f[0] {
		case "pod": // address id
			s.Pods[addr(f[1])] = egress.ID(number(f[2]))
		case "nexthop": // id mark
			s.NextHops[egress.ID(number(f[1]))] = egress.Mark(number(f[2]))
		case "hosted": // id address mark, and bytes per second and bytes of burst where there is a limit
			h := Hosted{IP: addr(f[2]), Mark: egress.Mark(number(f[3]))}
			if len(f) > 4 {
				h.Limit = Limit{Rate: uint64(number(f[4])), Burst: uint64(number(f[5]))}
			}
			s.Hosted[egress.ID(number(f[1]))] = h
		case "vlan": // id link; after hosted
			h := s.Hosted[egress.ID(number(f[1]))]
			h.Link = f[2]
			s.Hosted[egress.ID(number(f[1]))] = h
		case "addressguard": // address
			s.AddressGuard = append(s.AddressGuard, addr(f[1]))
		case "except": // prefix
			s.Except = append(s.Except, netip.MustParsePrefix(f[1]))
		case "node": // address
			s.Nodes = append(s.Nodes, addr(f[1]))
		case "known": // address
			s.Unselected = append(s.Unselected, addr(f[1]))
		case "podcidr": // prefix
			s.PodCIDRs = append(s.PodCIDRs, netip.MustParsePrefix(f[1]))
		case "random": // ports
			s.RandomPorts = true
		case "delay": // duration
			d, err := time.ParseDuration(f[1])
			if err != nil {
				t.Fatalf("state: %v", err)
			}
			s.FirstPacketDelay = d
		case "carrier": // link MAC address...
			mac, err := net.ParseMAC(f[2])
			if err != nil {
				t.Fatalf("state: %v", err)
			}
			c := Carrier{MAC: [6]byte(mac)}
			for _, ip := range f[3:] {
				c.IPs = append(c.IPs, addr(ip))
			}
			if s.Carriers == nil {
				s.Carriers = map[string]Carrier{}
			}
			s.Carriers[f[1]] = c
		case "renewal": // permit lease
			var d [2]time.Duration
			for i := range d {
				var err error
				if d[i], err = time.ParseDuration(f[i+1]); err != nil {
					t.Fatalf("state: %v", err)
				}
			}
			s.Renewal = NewRenewal(d[0], d[1])
		case "mtu": // bytes
			s.OverlayMTU = number(f[1])
		case "self": // address
			s.Self = addr(f[1])
		case "overlaysource": // id address
			s.OverlaySources = mapPut(s.OverlaySources, egress.ID(number(f[1])), addr(f[2]))
		case "sender": // node source id
			s.Senders = append(s.Senders, Sender{addr(f[1]), addr(f[2]), egress.ID(number(f[3]))})
		case "block": // id address first size
			s.Blocks = mapPut(s.Blocks, egress.ID(number(f[1])), egress.Block{IP: addr(f[2]), First: uint16(number(f[3])), Size: number(f[4])})
		case "gateway": // id index
			s.Gateways = mapPut(s.Gateways, egress.ID(number(f[1])), number(f[2]))
		case "port": // address first size index node
			s.Ports = append(s.Ports, Port{egress.Block{IP: addr(f[1]), First: uint16(number(f[2])), Size: number(f[3])}, number(f[4]), addr(f[5])})
		case "peer": // index node
			s.Peers = mapPut(s.Peers, number(f[1]), addr(f[2]))
		case "source": // address
			s.Sources = append(s.Sources, addr(f[1]))
		case "pooled": // address
			s.Sources, s.Pooled = append(s.Sources, addr(f[1])), append(s.Pooled, addr(f[1]))
		default:
			t.Fatalf("state: no such thing as %q", f[0])
		}
	}
	return s
}

// large returns a state with n pods of one egress each, of two families, all hosted here.
func large(n int) State {
	s := State{Pods: map[netip.Addr]egress.ID{}, NextHops: map[egress.ID]egress.Mark{}, Hosted: map[egress.ID]Hosted{}, OverlayMTU: 1450}
	pod, ip := netip.MustParseAddr("10.244.0.1"), netip.MustParseAddr("10.10.0.1")
	for i := range n {
		id := egress.ID(i + 1)
		s.Pods[pod], s.NextHops[id], s.Hosted[id] = id, egress.LocalMark, Hosted{IP: ip, Mark: egress.LocalMark}
		s.AddressGuard = append(s.AddressGuard, ip)
		// Every other address: ranges that cannot be merged.
		s.Except = append(s.Except, netip.PrefixFrom(ip, 32))
		pod, ip = pod.Next(), ip.Next().Next()
	}
	return s
}

func TestEqualArgumentsGiveEqualChanges(t *testing.T) {
	s := large(1200)
	first := Diff(Observed{}, s)
	for range 5 {
		slices.Reverse(s.Except)
		slices.Reverse(s.AddressGuard)
		if diff := cmp.Diff(first.String(), Diff(Observed{}, s).String()); diff != "" {
			t.Fatalf("Diff is not deterministic (-first +next):\n%s", diff)
		}
	}
}

func TestNoMessageIsNearTheLimitOf64KiB(t *testing.T) {
	s := large(2000)
	for i := range 2000 {
		a := netip.MustParseAddr(fmt.Sprintf("fd00:1:2:3:4:5:6:%x", 2*i))
		s.Pods[a], s.Except = 1, append(s.Except, netip.PrefixFrom(a, 128))
	}
	for _, o := range Diff(Observed{}, s).ops {
		for _, m := range o.msgs {
			if o.err != nil || len(m.Data) > 60<<10 {
				t.Errorf("%s: %d bytes, %v", short(o.line), len(m.Data), o.err)
			}
		}
	}
}

// What the guard lets pass without a look at the pods must not be one.
func TestASelectedPodIsNoneOfThoseThatAreNot(t *testing.T) {
	tables := open(t)
	reach(t, tables, parseState(t, "known 10.244.1.2\nknown fd44:1::2"))
	want := parseState(t, "pod 10.244.1.2 5\nknown 10.244.1.2\npod fd44:1::2 6")
	want.Keep = true
	reach(t, tables, want)
	for _, set := range []string{"known4", "known6"} {
		if got := netns.Run(t, "nft list set inet egret "+set); strings.Contains(got, "elements") {
			t.Errorf("with what was there kept:\n%s", got)
		}
	}
}
