package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"

	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/netns"
	"github.com/egret-project/egret/monitor"
	"github.com/egret-project/egret/nft"
	"github.com/egret-project/egret/plan"
)

// rounds is what an agent sees, round by round.
type rounds struct {
	m    *metrics
	now  time.Time
	dead map[string]bool
}

// next is one at which the owner of the IP is o, a move to the node to is asked for, and what is used newly is what
// uses says.
func (p *rounds) next(after time.Duration, o egress.Owner, to string, uses, whole bool) {
	p.now = p.now.Add(after)
	ip := netip.MustParseAddr("10.0.0.1")
	s := &egress.Snapshot{Egresses: map[string]egress.Policy{"web": {Addresses: []egress.Address{{IP: ip, ID: 1}}}}}
	if o.IP = ip; o.Node != "" {
		s.Owners = map[netip.Addr]egress.Owner{ip: o}
	}
	if to != "" {
		s.Moves = map[netip.Addr]egress.Move{ip: {IP: ip, To: to}}
	}
	p.m.arrivals(&round{Cluster: plan.New(s), now: p.now}, "here", func(node string) bool { return p.dead[node] })
	if uses {
		p.m.takes(o)
	}
	p.m.programmed(whole, p.now)
}

// histogram returns how often something took how long in all, by the value of its only label; "" where it has none.
func histogram(t *testing.T, m *metrics, d monitor.Metric) map[string]string {
	t.Helper()
	registry := prometheus.NewRegistry()
	registry.MustRegister(m.counts)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, f := range families {
		if f.GetName() != d.Name {
			continue
		}
		for _, one := range f.Metric {
			label := ""
			for _, l := range one.Label {
				label = l.GetValue()
			}
			if n := one.GetHistogram().GetSampleCount(); n > 0 {
				out[label] = fmt.Sprintf("%d in %.1fs", n, one.GetHistogram().GetSampleSum())
			}
		}
	}
	return out
}

func TestTakeoversAreToldByCauseWithWhatTheyTook(t *testing.T) {
	mine := func(why egress.Reason, from string) egress.Owner {
		return egress.Owner{Node: "here", Why: why, From: from}
	}
	there := egress.Owner{Node: "there", Why: egress.ReasonClaim}
	for name, tt := range map[string]struct {
		run  func(p *rounds)
		want map[string]string
	}{
		"the first owner": {func(p *rounds) {
			p.next(0, egress.Owner{}, "", false, true)
			p.next(500*time.Millisecond, mine("claim", ""), "", false, true)
			p.next(500*time.Millisecond, mine("claim", ""), "", true, true)
			p.next(time.Hour, mine("claim", ""), "", false, true)
		}, map[string]string{"claim": "1 in 1.0s"}},
		"a dead owner, seen by the gossip before its lease is revoked": {func(p *rounds) {
			p.next(0, there, "", false, true)
			p.dead["there"] = true
			p.next(time.Hour, there, "", false, true)
			p.next(300*time.Millisecond, egress.Owner{}, "", false, true)
			p.next(100*time.Millisecond, mine("claim", ""), "", false, true)
			p.next(500*time.Millisecond, mine("claim", ""), "", true, true)
		}, map[string]string{"crash": "1 in 0.9s"}},
		"an owner that was taken for dead, and lives": {func(p *rounds) {
			p.dead["there"] = true
			p.next(0, there, "", false, true)
			p.dead["there"] = false
			p.next(time.Hour, there, "", false, true)
			p.next(time.Hour, there, "here", false, true)
			p.next(100*time.Millisecond, mine("move", "there"), "", true, true)
		}, map[string]string{"move": "1 in 0.1s"}},
		"an IP that was given up": {func(p *rounds) {
			p.next(0, there, "", false, true)
			p.next(time.Hour, egress.Owner{}, "", false, true)
			p.next(200*time.Millisecond, mine("claim", "there"), "", true, true)
		}, map[string]string{"release": "1 in 0.2s"}},
		"a kernel that could not be programmed at first": {func(p *rounds) {
			p.next(0, egress.Owner{}, "", false, true)
			p.next(100*time.Millisecond, mine("claim", ""), "", true, false)
			p.next(900*time.Millisecond, mine("claim", ""), "", false, true)
		}, map[string]string{"claim": "1 in 1.0s"}},
		"an agent that is started again": {func(p *rounds) {
			p.next(0, mine("claim", ""), "", true, true)
			p.next(time.Hour, mine("claim", ""), "", false, true)
		}, map[string]string{}},
		"one there and back": {func(p *rounds) {
			p.next(0, mine("claim", ""), "", true, true)
			p.next(time.Hour, egress.Owner{Node: "there", Why: "move", From: "here"}, "", false, true)
			p.next(time.Hour, there, "here", false, true)
			p.next(time.Second, mine("drain", "there"), "", true, true)
		}, map[string]string{"drain": "1 in 1.0s"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := &rounds{m: newMetrics(), now: time.Now(), dead: map[string]bool{}}
			tt.run(p)
			if got := histogram(t, p.m, metricTakeover); fmt.Sprint(got) != fmt.Sprint(tt.want) {
				t.Errorf("told %v, want %v", got, tt.want)
			}
			if len(p.m.taken) > 0 {
				t.Errorf("left over: %v", p.m.taken)
			}
		})
	}
}

func TestAChangeIsTimedUntilTheKernelHasIt(t *testing.T) {
	m, now := newMetrics(), time.Now()
	m.came(now)
	m.changes("nftables", 2)
	m.programmed(false, now.Add(time.Second))
	m.came(now.Add(time.Second))
	m.changes("routes", 1)
	m.programmed(true, now.Add(2*time.Second))
	m.came(now.Add(time.Hour)) // of something that the kernel has nothing of
	m.changes("routes", 0)
	m.programmed(true, now.Add(2*time.Hour))
	if got := histogram(t, m, metricToKernel)[""]; got != "1 in 2.0s" {
		t.Errorf("told %s, want 1 in 2.0s", got)
	}
}

func TestWhatAPassCouldNotProgramIsToldByPart(t *testing.T) {
	m := newMetrics()
	for _, tt := range []struct {
		err  error
		want string
	}{
		{nil, "[]"},
		{errors.Join(in("routes", errors.New("x")), in("addresses", errors.New("y")), in("routes", errors.New("z"))), "[addresses routes]"},
		{errors.New("etcd does not answer"), "[other]"},
		{nil, "[]"},
	} {
		m.reconciled(time.Millisecond, tt.err, faults(tt.err), []netip.Addr{netip.MustParseAddr("10.0.0.1")})
		if got := fmt.Sprint(m.degraded); got != tt.want || len(m.owned) != 1 {
			t.Errorf("%v: told %s, %v; want %s", tt.err, got, m.owned, tt.want)
		}
	}
}

// scrape1000 returns a scrape of an agent with 1,000 egress IPs, all of which its node holds and its pods use, from the
// kernel's tables to the text, in a network namespace of its own.
func scrape1000(t testing.TB) (scrape func() (bytes int)) {
	t.Helper()
	netns.Enter(t)
	tables, err := nft.New(nft.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tables.Close() })
	s := nft.State{Pods: map[netip.Addr]egress.ID{}, Hosted: map[egress.ID]nft.Hosted{}, NextHops: map[egress.ID]egress.Mark{}}
	ips := map[egress.ID]netip.Addr{}
	m := newMetrics()
	for i := range 1000 {
		id, ip := egress.ID(i+1), netip.AddrFrom4([4]byte{10, 1, byte(i / 250), byte(i%250 + 1)})
		ips[id] = ip
		s.Pods[netip.AddrFrom4([4]byte{10, 2, byte(i / 250), byte(i%250 + 1)})] = id
		s.Hosted[id] = nft.Hosted{IP: ip, Mark: egress.LocalMark}
		s.NextHops[id] = egress.LocalMark
		m.owned = append(m.owned, ip)
	}
	have, err := tables.Observe()
	if err != nil {
		t.Fatal(err)
	}
	if err := tables.Apply(nft.Diff(have, s)); err != nil {
		t.Fatal(err)
	}
	// What the agent knows besides, of each IP.
	reading := monitor.NewReading(read(), func(put func(monitor.Metric, float64, ...string)) error {
		for _, ip := range m.owned {
			put(metricOwned, 1, ip.String())
			put(metricPorts, 1024, ip.String())
			put(metricPortsUsed, 17, ip.String())
			put(metricOpened, 17, ip.String()) // the kernel has none here: there was no packet
			put(metricOpen, 17, ip.String())
		}
		return readKernel(tables, nil, ips, put)
	})
	registry := prometheus.NewRegistry()
	if err := m.register(registry, reading); err != nil {
		t.Fatal(err)
	}
	return func() int {
		families, err := registry.Gather()
		if err != nil {
			t.Fatal(err)
		}
		var out strings.Builder
		for _, f := range families {
			if _, err := expfmt.MetricFamilyToText(&out, f); err != nil {
				t.Fatal(err)
			}
		}
		return out.Len()
	}
}

func BenchmarkScrapeOf1000EgressIPs(b *testing.B) {
	scrape := scrape1000(b)
	size, before := 0, cpu(b)
	for b.Loop() {
		size = scrape()
	}
	b.ReportMetric(float64((cpu(b)-before).Microseconds())/1000/float64(b.N), "ms-cpu/scrape")
	b.ReportMetric(float64(size), "bytes/scrape")
}

// It is the time on a processor that counts, and the least of several scrapes: what else the machine does makes one
// longer (twice as long with 15 programs on each processor), and none shorter. So one that costs little is enough, and
// a machine that is busy gets time for it.
func TestAScrapeOf1000EgressIPsCostsLessThan50Milliseconds(t *testing.T) {
	const limit, patience = 50 * time.Millisecond, 90 * time.Second
	scrape := scrape1000(t)
	least := time.Hour
	for end := time.Now().Add(patience); least > limit*raceFactor && time.Now().Before(end); {
		before := cpu(t)
		if size := scrape(); size < 400_000 {
			t.Fatalf("%d bytes: that is not all of it", size)
		}
		least = min(least, cpu(t)-before)
	}
	t.Logf("%v of a processor", least)
	if least > limit*raceFactor {
		t.Errorf("it takes %v of a processor, want %v at most", least, limit*raceFactor)
	}
}

// cpu returns the processor time of this process, that of the kernel for it included.
func cpu(b testing.TB) time.Duration {
	b.Helper()
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		b.Fatal(err)
	}
	return time.Duration(r.Utime.Nano() + r.Stime.Nano())
}
