package nft

import (
	"errors"
	"net/netip"
	"testing"
	"time"
)

func messages(c Changes) (n int) {
	for _, o := range c.ops {
		n += len(o.msgs)
	}
	return n
}

// A node's agent starts on a node without tables: 500 pods, each with an egress IP of its own.
func BenchmarkLoad500PodsFromNothing(b *testing.B) {
	tables := open(b)
	want := large(500)
	var c Changes
	for b.Loop() {
		b.StopTimer()
		if err := tables.Delete(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		c = Diff(observe(b, tables), want)
		if err := tables.Apply(c); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(messages(c)), "messages/op")
}

// A pod starts on a node that has 500: read, compare, write.
func BenchmarkOneMorePod(b *testing.B) {
	tables := open(b)
	want := large(500)
	reach(b, tables, want)
	pod := netip.MustParseAddr("10.244.255.1")
	var c Changes
	for i := 0; b.Loop(); i++ {
		if i%2 == 0 {
			want.Pods[pod] = 5
		} else {
			delete(want.Pods, pod)
		}
		c = Diff(observe(b, tables), want)
		if err := tables.Apply(c); err != nil {
			b.Fatal(err)
		}
	}
	one := b.Elapsed() / time.Duration(b.N)
	b.ReportMetric(float64(messages(c)), "messages/op")

	// The alternative: all anew, without a look at what is there.
	const reloads = 10
	begin := time.Now()
	for range reloads {
		c = Diff(Observed{}, want)
		if err := errors.Join(tables.Delete(), tables.Apply(c)); err != nil {
			b.Fatal(err)
		}
	}
	reload := time.Since(begin) / reloads
	b.ReportMetric(float64(messages(c)), "messages/reload")
	b.ReportMetric(float64(reload), "ns/reload")
	b.ReportMetric(float64(reload)/float64(one), "reload/op")
}

func BenchmarkRenew10Permits(b *testing.B) {
	tables := open(b)
	reach(b, tables, large(500))
	var list []Permit
	for ip := ip4; len(list) < 10; ip = ip.Next() {
		list = append(list, Permit{IP: ip, Answer: true})
	}
	for b.Loop() {
		if err := tables.Permit(list, time.Second); err != nil {
			b.Fatal(err)
		}
	}
}
