package lab

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestEvaluate(t *testing.T) {
	const ms = time.Millisecond
	a, b := netip.MustParseAddrPort("10.10.0.8:40000"), netip.MustParseAddrPort("10.10.0.101:1024")
	sent := []time.Duration{0, 10 * ms, 20 * ms, 30 * ms}
	for _, test := range []struct {
		name    string
		answers map[uint64]netip.AddrPort
		want    ProbeResult
	}{
		{"without loss the gap is the interval", map[uint64]netip.AddrPort{0: a, 1: a, 2: a, 3: b}, ProbeResult{4, 0, 10 * ms, 10 * ms, map[netip.Addr]int{a.Addr(): 3, b.Addr(): 1}, map[uint16]int{40000: 3, 1024: 1}, 0, 0}},
		{"a loss in the middle lasts from the one before to the one after", map[uint64]netip.AddrPort{0: a, 3: a}, ProbeResult{4, 2, 30 * ms, 10 * ms, map[netip.Addr]int{a.Addr(): 2}, map[uint16]int{40000: 2}, 0, 2}},
		{"a loss at the ends counts from the begin and to the end", map[uint64]netip.AddrPort{1: a}, ProbeResult{4, 3, 30 * ms, 30 * ms, map[netip.Addr]int{a.Addr(): 1}, map[uint16]int{40000: 1}, 0, 3}},
		{"without any answer the gap is the whole probe", nil, ProbeResult{4, 4, 40 * ms, 40 * ms, map[netip.Addr]int{}, map[uint16]int{}, 0, 4}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if diff := cmp.Diff(test.want, evaluate(sent, 40*ms, test.answers)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestEvaluateCountsStalls(t *testing.T) {
	const ms = time.Millisecond
	r := evaluate([]time.Duration{0, 20 * ms, 70 * ms, 71 * ms, 101 * ms}, 102*ms, nil)
	if r.Stalled != 40*ms {
		t.Errorf("stalled for %v, want 40ms: pauses of 50ms and 30ms, each less 20ms", r.Stalled)
	}
}

func TestEvaluateTellsWhatTheMachineDoesNotAccountFor(t *testing.T) {
	const ms = time.Millisecond
	var sent []time.Duration
	for at := range 300 * ms / ms {
		if at < 100 || at > 140 { // it stood still from 99 ms to 141 ms
			sent = append(sent, at*ms)
		}
	}
	for at, excused := range map[time.Duration]bool{10 * ms: false, 78 * ms: false, 79 * ms: true, 99 * ms: true, 141 * ms: true, 183 * ms: true, 184 * ms: false, 299 * ms: false} {
		answers := map[uint64]netip.AddrPort{}
		for i, s := range sent {
			if s != at {
				answers[uint64(i)] = netip.MustParseAddrPort("10.10.0.11:1024")
			}
		}
		r := evaluate(sent, 300*ms, answers)
		if r.Lost != 1 || (r.LostAwake == 0) != excused {
			t.Errorf("what was sent at %v is lost: %d lost, %d of them awake; excused: want %v", at, r.Lost, r.LostAwake, excused)
		}
	}
}

func TestParsersRefuseShortFrames(t *testing.T) {
	for _, etherType := range [][]byte{{8, 0}, {8, 6}, {0x86, 0xdd}} {
		frame := append(make([]byte, 12), etherType...)
		for len(frame) < 40 {
			if p, ok := parsePacket(frame); ok && len(frame) < ethernetHeader+20 {
				t.Errorf("packet in %d bytes: %v", len(frame), p)
			}
			if a, ok := parseARP(frame); ok {
				t.Errorf("ARP in %d bytes: %v", len(frame), a)
			}
			if n, ok := parseNDP(frame); ok {
				t.Errorf("NDP in %d bytes: %v", len(frame), n)
			}
			frame = append(frame, 0)
		}
	}
}

func TestALabServesTheWebhookByDefault(t *testing.T) {
	for _, without := range []bool{false, true} {
		l := &Lab{cfg: Config{EtcdMembers: 1, NoWebhook: without}}
		if got := slices.Contains(l.crdsync().argv, "--webhook"); got == without {
			t.Errorf("NoWebhook %t: crdsync is started as %q", without, l.crdsync().argv)
		}
	}
}
