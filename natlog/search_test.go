package natlog

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"
)

// noon is when the logs of these tests begin; at is so many seconds later.
var noon = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)

func at(seconds float64) time.Time {
	return noon.Add(time.Duration(seconds * float64(time.Second)))
}

// line is a line of node n1 of a connection of a pod by 10.0.0.1:2048, to be changed.
func line(event Event, seconds float64, pod string, change ...func(*Line)) string {
	l := Line{
		Version: Version, Event: event, Time: at(seconds), Node: "n1", Egress: "web", EgressIP: netip.MustParseAddr("10.0.0.1"), Port: 2048,
		PodNamespace: "prod", PodName: pod, PodIP: netip.MustParseAddr("10.244.0." + cmp.Or(pod, "0")), PodPort: 1000, Protocol: "tcp",
		DestinationIP: netip.MustParseAddr("192.0.2.1"), DestinationPort: 443, ID: 7,
	}
	if event == New {
		l.Start = l.Time
	}
	if event == End {
		l.Stop = l.Time
	}
	if event == LogStart || event == LogStop || event == Lost {
		l = Line{Version: Version, Event: event, Time: at(seconds), Node: "n1"}
	}
	for _, f := range change {
		f(&l)
	}
	return string(appendLine(nil, &l))
}

func to(destination string) func(*Line) {
	return func(l *Line) { l.DestinationIP = netip.MustParseAddr(destination) }
}

func started(seconds float64) func(*Line) { return func(l *Line) { l.Start = at(seconds) } }

func lost(n uint64, since float64) func(*Line) {
	return func(l *Line) { l.Lost, l.Since, l.Reason = n, at(since), LostSocket }
}

// TestWhoHadAPort says for logs and moments whose pods had the port, and what may be missing ("" for nothing).
func TestWhoHadAPort(t *testing.T) {
	begin := line(LogStart, 0, "")
	for name, tt := range map[string]struct {
		log     string
		at      map[float64]string
		missing string
	}{
		"one": {begin + line(New, 10, "1") + line(End, 20, "1", started(10)), map[float64]string{9: "", 10: "1", 19: "1", 20: "", 30: ""}, ""},
		"another pod has it a second later": {
			begin + line(New, 10, "1") + line(End, 11, "1", started(10)) + line(New, 12, "2") + line(End, 13, "2", started(12)),
			map[float64]string{10: "1", 11: "", 12: "2", 13: ""}, ""},
		"two pods have it at a time, to two destinations": {
			begin + line(New, 10, "1") + line(New, 11, "2", to("192.0.2.2")) + line(End, 20, "1", started(10)) + line(End, 21, "2", to("192.0.2.2"), started(11)),
			map[float64]string{10: "1", 15: "1 2", 20: "2"}, ""},
		"it was heard of a moment later": {begin + line(New, 10.2, "1") + line(New, 10.4, "2", to("192.0.2.2")), map[float64]string{9.5: "", 10: "1 2", 10.3: "1"}, ""},
		"it goes on":                     {begin + line(New, 10, "1"), map[float64]string{9: "", 10: "1", 1000: "1"}, ""},
		"it was there before the log":    {begin + line(Known, 0.5, "1") + line(End, 20, "1"), map[float64]string{0.2: "1", 10: "1", 20: ""}, ""},
		"its beginning was lost":         {begin + line(End, 20, "1"), map[float64]string{10: "1", 20: ""}, ""},
		"its beginning was lost, and is known": {
			begin + line(End, 20, "1", started(15)), map[float64]string{14: "", 15: "1", 20: ""}, ""},
		"its end was lost, and the same ends meet again": {
			begin + line(New, 10, "1") + line(New, 30, "1") + line(End, 40, "1", started(30)), map[float64]string{20: "1", 35: "1", 40: ""}, ""},
		"the agent is restarted, and it goes on": {
			begin + line(New, 10, "1") + line(LogStop, 20, "") + line(LogStart, 22, "") + line(Known, 22.5, "1") + line(End, 40, "1"),
			map[float64]string{10: "1", 30: "1", 40: ""}, ""},
		"the agent is restarted, and it was gone": {
			begin + line(New, 10, "1") + line(LogStop, 20, "") + line(LogStart, 22, ""), map[float64]string{15: "1", 23: ""}, ""},
		"the agent was away":        {begin + line(LogStop, 20, "") + line(LogStart, 22, ""), map[float64]string{21: ""}, "wrote nothing from 2026-11-28T12:00:20Z to 2026-11-28T12:00:22Z"},
		"the agent is away":         {begin + line(LogStop, 20, ""), map[float64]string{21: ""}, "the log of node n1 ends at 2026-11-28T12:00:20Z"},
		"the agent was killed":      {begin + line(New, 10, "2", to("192.0.2.2")) + line(LogStart, 22, ""), map[float64]string{21: "2"}, "was killed before 2026-11-28T12:00:22Z"},
		"before the log":            {begin + line(New, 10, "1"), map[float64]string{-1: ""}, "the log begins at 2026-11-28T12:00:00Z"},
		"some were lost then":       {begin + line(Lost, 12, "", lost(5, 11)), map[float64]string{10: "", 11: "", 70: ""}, "n1 lost 5 lines from 2026-11-28T12:00:11Z to 2026-11-28T12:00:12Z (socket)"},
		"some were lost long ago":   {begin + line(Lost, 12, "", lost(5, 11)), map[float64]string{100: ""}, ""},
		"one in ten":                {begin + line(New, 10, "1", func(l *Line) { l.Sample = 10 }), map[float64]string{10: "1"}, "one connection in 10"},
		"some namespaces alone":     {line(LogStart, 0, "", func(l *Line) { l.Filter = []string{"namespace=a"} }), map[float64]string{10: ""}, "connections of namespace=a alone"},
		"another IP, another port":  {begin + line(New, 10, "1", func(l *Line) { l.Port = 20480 }) + line(New, 10, "1", func(l *Line) { l.EgressIP = netip.MustParseAddr("10.0.0.2") }), map[float64]string{10: ""}, ""},
		"a line was cut off":        {begin + line(New, 10, "1")[:200] + "\n" + line(New, 11, "2"), map[float64]string{12: "2"}, "1 lines could not be read"},
		"a line is being written":   {begin + line(New, 10, "1") + line(New, 11, "2")[:100], map[float64]string{12: "1"}, ""},
		"a newer schema":            {begin + line(New, 10, "1", func(l *Line) { l.Version = 2 }), map[float64]string{12: ""}, "1 lines could not be read"},
		"collected by others":       {"2026-11-28T12:00:00.0Z stdout F " + begin + "2026-11-28T12:00:00.0Z stdout F " + line(New, 10, "1"), map[float64]string{12: "1"}, ""},
		"a line without end":        {begin + strings.Repeat("2048 ", 40000) + "\n" + line(New, 10, "1"), map[float64]string{12: "1"}, "1 lines could not be read"},
		"nothing":                   {"", map[float64]string{10: ""}, "the log is empty"},
		"an end without its pod":    {begin + line(New, 10, "1") + line(End, 20, "1", started(10), func(l *Line) { l.PodName, l.PodNamespace = "", "" }), map[float64]string{12: "1"}, ""},
		"found to be gone, unseen":  {begin + line(New, 10, "1") + line(End, 50, "1", func(l *Line) { l.Unseen = true }), map[float64]string{12: "1", 50: ""}, ""},
		"an ICMP echo has no ports": {begin + line(New, 10, "1", func(l *Line) { l.Protocol, l.DestinationPort = "icmp", 0 }), map[float64]string{12: "1"}, ""},
	} {
		for second, want := range tt.at {
			q := Question{IP: netip.MustParseAddr("10.0.0.1"), Port: 2048, From: at(second), To: at(second).Add(time.Millisecond)}
			a, err := Search(t.Context(), q, strings.NewReader(tt.log))
			var pods []string
			for _, u := range a.Uses {
				pods = append(pods, u.PodName)
			}
			if got := strings.Join(pods, " "); err != nil || got != want {
				t.Errorf("%s, at %v: pods %q, %v; want %q", name, second, got, err, want)
			}
			if got := strings.Join(a.Missing, "; "); tt.missing == "" && got != "" || !strings.Contains(got, tt.missing) {
				t.Errorf("%s, at %v: missing is %q, want %q", name, second, got, tt.missing)
			}
		}
	}
}

// TestWhoHadAnOverlayAddress asks the log of a pod's node, and both that and the gateway's, for a pod for which the
// gateway translates.
func TestWhoHadAnOverlayAddress(t *testing.T) {
	between := netip.MustParseAddr("0.5.0.1")
	overlaid := func(l *Line) { l.OverlayIP, l.OverlayPort = between, 1000 }
	ofPod := line(New, 10, "1", overlaid, func(l *Line) { l.Port = 0 })
	ofGateway := line(New, 10, "", overlaid, func(l *Line) { l.Node, l.PodNode, l.PodIP, l.PodPort, l.Port = "gw", "n1", netip.Addr{}, 0, 1024 })
	q := Question{IP: between, Port: 1000, From: at(10), To: at(11)}
	for name, log := range map[string]string{"the pod's node": ofPod, "both nodes": ofGateway + ofPod} {
		a, err := Search(t.Context(), q, strings.NewReader(line(LogStart, 0, "")+log))
		if err != nil || len(a.Uses) != 1 || a.Uses[0].PodName != "1" || len(a.Missing) > 0 {
			t.Errorf("%s: %+v, %v", name, a, err)
		}
	}
	q.Port = 1001
	if a, err := Search(t.Context(), q, strings.NewReader(line(LogStart, 0, "")+ofPod)); err != nil || len(a.Uses) != 0 {
		t.Errorf("another port: %+v, %v", a, err)
	}
}

func TestASearchThatTakesTooLongSaysSo(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	a, err := Search(ctx, Question{IP: netip.MustParseAddr("10.0.0.1"), Port: 2048, From: at(1), To: at(2)}, strings.NewReader(line(LogStart, 0, "")+line(New, 1, "1")))
	if err != nil || len(a.Missing) == 0 || !strings.Contains(strings.Join(a.Missing, ";"), "not read whole") {
		t.Errorf("%+v, %v", a, err)
	}
}

// TestAnAnswerIsBounded has more connections by one port than anybody reads.
func TestAnAnswerIsBounded(t *testing.T) {
	log := line(LogStart, 0, "")
	for i := range 3 * MaxUses {
		log += line(New, 1, "1", to(fmt.Sprintf("192.0.%d.%d", i/250, i%250)))
	}
	q := Question{IP: netip.MustParseAddr("10.0.0.1"), Port: 2048, From: at(1), To: at(2)}
	a, err := Search(t.Context(), q, strings.NewReader(log))
	if err != nil || !a.More || len(a.Uses) != MaxUses {
		t.Errorf("%d uses, more: %t, %v", len(a.Uses), a.More, err)
	}
	// What is chosen is chosen before that.
	q.Destination, q.Protocol = netip.MustParseAddr(fmt.Sprintf("192.0.%d.%d", (3*MaxUses-1)/250, (3*MaxUses-1)%250)), "tcp"
	if parsed, err := ParseQuestion(q.Query()); err != nil || parsed.Destination != q.Destination || parsed.Protocol != q.Protocol {
		t.Errorf("read as %+v, %v", parsed, err)
	}
	if a, err := Search(t.Context(), q, strings.NewReader(log)); err != nil || a.More || len(a.Uses) != 1 {
		t.Errorf("of one destination: %d uses, more: %t, %v", len(a.Uses), a.More, err)
	}
	q.Protocol = "udp"
	if a, err := Search(t.Context(), q, strings.NewReader(log)); err != nil || len(a.Uses) != 0 {
		t.Errorf("of another protocol: %d uses, %v", len(a.Uses), err)
	}
}

// TestLinesAreJSONWhateverIsInThem: names come from etcd, and etcd's writers may be anybody.
func TestLinesAreJSONWhateverIsInThem(t *testing.T) {
	evil := "a\"b\\c\n\x00\xff{<é\u2028"
	b := appendLine(nil, &Line{Version: Version, Event: New, Time: noon, Node: evil, PodName: evil, Egress: evil, Filter: []string{evil}})
	if strings.Count(string(b), "\n") != 1 {
		t.Fatalf("%q: want one line", b)
	}
	var l Line
	if err := json.Unmarshal(b, &l); err != nil || l.PodName != strings.ToValidUTF8(evil, "�") {
		t.Errorf("%q, %v", l.PodName, err)
	}
}

// TestLinesAreAsEncodingJSONHasThem sets each field alone, and all of them.
func TestLinesAreAsEncodingJSONHasThem(t *testing.T) {
	var all Line
	same := func(what string, l Line) {
		t.Helper()
		want, err := json.Marshal(l)
		if got := string(appendLine(nil, &l)); err != nil || got != string(want)+"\n" {
			t.Errorf("%s: %v\n%s, want\n%s", what, err, got, want)
		}
	}
	same("nothing", all)
	for i := range reflect.TypeFor[Line]().NumField() {
		var one Line
		for _, l := range []*Line{&one, &all} {
			switch f := reflect.ValueOf(l).Elem().Field(i); v := f.Addr().Interface().(type) {
			case *time.Time:
				*v = noon.Add(123456789)
			case *netip.Addr:
				*v = netip.MustParseAddr("2001:db8::5")
			case *[]string:
				*v = []string{"a=b", "c=<d>"}
			case **Traffic:
				*v = &Traffic{1, 2, 0, 1 << 60}
			case *bool:
				*v = true
			default:
				switch f.Kind() {
				case reflect.String:
					f.SetString("na\"me-" + strconv.Itoa(i))
				case reflect.Int:
					f.SetInt(int64(i) + 2)
				default:
					f.SetUint(uint64(i) + 2)
				}
			}
		}
		same(reflect.TypeFor[Line]().Field(i).Name, one)
	}
	same("all", all)
}

// TestNothingIsMissedWhileFilesAreRotated searches again and again while the log goes from file to file.
func TestNothingIsMissedWhileFilesAreRotated(t *testing.T) {
	name := filepath.Join(t.TempDir(), "nat[1]*.log") // a name that would be a pattern
	out := File(name, 1, 3, 0)
	c := &counts{}
	w := NewWriter(c.config(Config{Out: out, Node: "n1"}))
	go w.Run()
	w.Write(&Line{Event: LogStart, Time: at(0), Node: "n1"})
	q := Question{IP: netip.MustParseAddr("10.0.0.1"), Port: 2048, From: at(5), To: at(6)}
	w.Write(&Line{Event: New, Time: at(1), Start: at(1), Node: "n1", EgressIP: q.IP, Port: q.Port, PodName: "1", ID: 1})
	for batch := range 12 {
		for i := range 1000 { // 2.5 MB in all, in files of 1
			w.Write(&Line{Event: New, Time: at(2), Start: at(2), Node: "n1", EgressIP: q.IP, Port: 3000, PodName: "other", ID: uint32(2 + i), PodNamespace: "a-namespace", Egress: "an-egress"})
		}
		eventually(t, func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.wrote == 2+1000*(batch+1) })
		for range 5 {
			a, err := SearchFile(t.Context(), q, name)
			if err != nil || len(a.Uses) != 1 || len(a.Missing) != 0 {
				t.Fatalf("batch %d: %+v, %v", batch, a, err)
			}
		}
	}
	if !w.Close(10 * time.Second) {
		t.Error("not all is written")
	}
	files, err := open(name)
	for _, f := range files {
		if info, err := f.Stat(); err != nil || info.Size() > 1<<20 {
			t.Errorf("%s has %d bytes, %v", f.Name(), info.Size(), err)
		}
		f.Close()
	}
	if err != nil || len(files) < 3 {
		t.Errorf("%d files, %v: nothing was rotated", len(files), err)
	}
	if err := out.Close(); err != nil {
		t.Error(err)
	}
	if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v: want a file that root alone reads", info, err)
	}
}

func eventually(t *testing.T, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it did not come to pass in 20 s")
		}
	}
}
