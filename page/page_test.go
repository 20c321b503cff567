package page

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/egret-project/egret/connlimit"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/syncbuf"
	"github.com/egret-project/egret/operator"
	"github.com/egret-project/egret/store"
)

func state(objects map[string]string) State {
	s := State{1, map[string]map[string]json.RawMessage{}}
	for name, text := range objects {
		kind, name, _ := strings.Cut(name, " ")
		if s.Objects[kind] == nil {
			s.Objects[kind] = map[string]json.RawMessage{}
		}
		s.Objects[kind][name] = json.RawMessage(text)
	}
	return s
}

func TestAChangeHasWhatIsNotAsItWas(t *testing.T) {
	from := state(map[string]string{"node a": `{"n":1}`, "node b": `{}`, "egress a": `{}`, "pool p": `1`})
	to := state(map[string]string{"node a": `{"n":2}`, "node c": `{}`, "egress a": `{}`})
	to.Revision = 7
	got, err := json.Marshal(Diff(from, to, 100))
	if err != nil {
		t.Fatal(err)
	}
	want := `[{"revision":7,"put":{"node":{"a":{"n":2},"c":{}}},"gone":{"node":["b"],"pool":["p"]}}]`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if parts := Diff(to, to, 100); parts != nil {
		t.Errorf("from a state to itself there is %v to do", parts)
	}
}

func TestThePartsOfAChangeAreBoundedAndTogetherAllOfIt(t *testing.T) {
	objects := map[string]string{}
	for i := range 1000 {
		objects[fmt.Sprintf("node n%d", i)] = `{}`
	}
	for name, tt := range map[string]struct{ from, to State }{
		"whole": {State{}, state(objects)}, "all gone": {state(objects), state(nil)}, "none": {State{}, state(nil)},
	} {
		t.Run(name, func(t *testing.T) {
			parts := Diff(tt.from, tt.to, 300)
			n := 0
			for i, p := range parts {
				m := len(p.Put["node"]) + len(p.Gone["node"])
				if n += m; m > 300 || p.More != (i < len(parts)-1) || p.Whole != (i == 0 && name == "whole") {
					t.Errorf("part %d has %d objects, more %v, whole %v", i, m, p.More, p.Whole)
				}
			}
			if n != len(tt.from.Objects["node"])+len(tt.to.Objects["node"]) {
				t.Errorf("%d objects in all parts", n)
			}
		})
	}
}

// get asks as a browser that names a host does.
func get(h http.Handler, method, url string, header http.Header) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, url, nil)
	for k, v := range header {
		r.Header[k] = v
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// unread fails the test when it is read.
type unread struct{ t *testing.T }

func (u unread) Read([]byte) (int, error) { u.t.Error("a body is read"); return 0, io.EOF }

func TestNoBodyIsRead(t *testing.T) {
	h := Local(newCluster(t, 3, 5).page().Handler())
	for _, path := range []string{"/describe?kind=node&name=n", "/search?q=a", "/trace?pod=a/b", "/state"} {
		r := httptest.NewRequest("GET", "http://127.0.0.1"+path, unread{t})
		r.Header.Set("Content-Type", "multipart/form-data; boundary=x")
		h.ServeHTTP(httptest.NewRecorder(), r)
	}
}

func TestWhatARequestMustNotDo(t *testing.T) {
	h := Local(newCluster(t, 3, 5).page().Handler())
	for name, tt := range map[string]struct {
		method, url string
		header      http.Header
		want        int
	}{
		"the page":                        {"GET", "http://127.0.0.1:8487/", nil, 200},
		"by its name":                     {"GET", "http://localhost:9/", nil, 200},
		"by IPv6":                         {"GET", "http://[::1]:8487/state", nil, 200},
		"HEAD":                            {"HEAD", "http://127.0.0.1/state", nil, 200},
		"another name (DNS rebinding)":    {"GET", "http://evil.example:8487/state", nil, 403},
		"a name like it":                  {"GET", "http://localhost.evil.example/state", nil, 403},
		"an address that is not loopback": {"GET", "http://10.0.0.1:8487/state", nil, 403},
		"no host":                         {"GET", "/state", http.Header{}, 403},
		"by another site's script":        {"GET", "http://127.0.0.1/state", http.Header{"Sec-Fetch-Site": {"cross-site"}, "Sec-Fetch-Mode": {"no-cors"}}, 403},
		"by a page at another port":       {"GET", "http://127.0.0.1/state", http.Header{"Sec-Fetch-Site": {"same-site"}, "Sec-Fetch-Mode": {"cors"}}, 403},
		"by a link elsewhere":             {"GET", "http://127.0.0.1/", http.Header{"Sec-Fetch-Site": {"cross-site"}, "Sec-Fetch-Mode": {"navigate"}}, 200},
		"by another site's frame":         {"GET", "http://127.0.0.1/events", http.Header{"Sec-Fetch-Site": {"cross-site"}, "Sec-Fetch-Mode": {"navigate"}, "Sec-Fetch-Dest": {"iframe"}}, 403},
		"the page in a frame":             {"GET", "http://127.0.0.1/", http.Header{"Sec-Fetch-Site": {"cross-site"}, "Sec-Fetch-Mode": {"navigate"}, "Sec-Fetch-Dest": {"iframe"}}, 403},
		"by the page itself":              {"GET", "http://127.0.0.1/state", http.Header{"Sec-Fetch-Site": {"same-origin"}, "Sec-Fetch-Mode": {"cors"}}, 200},
		"POST":                            {"POST", "http://127.0.0.1/state", nil, 405},
		"PUT":                             {"PUT", "http://127.0.0.1/", nil, 405},
		"DELETE":                          {"DELETE", "http://127.0.0.1/trace?pod=a/b", nil, 405},
		"OPTIONS (a browser's preflight)": {"OPTIONS", "http://127.0.0.1/state", nil, 405},
		"a path out":                      {"GET", "http://127.0.0.1/static/../page.go", nil, 307},
		"an encoded path out":             {"GET", "http://127.0.0.1/%2e%2e%2f%2e%2e%2fetc/passwd", nil, 404},
		"a source file":                   {"GET", "http://127.0.0.1/static/index.html", nil, 404},
		"no such pod":                     {"GET", "http://127.0.0.1/trace?pod=a/b", nil, 404},
		"a trace of nothing":              {"GET", "http://127.0.0.1/trace", nil, 400},
		"a trace to a name":               {"GET", "http://127.0.0.1/trace?pod=a/b&to=example.org", nil, 400},
		"a trace of no protocol":          {"GET", "http://127.0.0.1/trace?pod=a/b&protocol=http", nil, 400},
		"a trace to a port of nothing":    {"GET", "http://127.0.0.1/trace?pod=a/b&port=443", nil, 400},
		"a trace to no number":            {"GET", "http://127.0.0.1/trace?pod=a/b&to=198.51.100.1&port=https", nil, 400},
		"a trace to no port":              {"GET", "http://127.0.0.1/trace?pod=a/b&to=198.51.100.1&port=65536", nil, 400},
		"a trace to a port of ICMP":       {"GET", "http://127.0.0.1/trace?pod=a/b&to=198.51.100.1&port=1&protocol=icmp", nil, 400},
		"a trace with all":                {"GET", "http://127.0.0.1/trace?pod=a/b&to=198.51.100.1&port=53&protocol=udp", nil, 404},
		"of no kind":                      {"GET", "http://127.0.0.1/describe?kind=secret&name=a", nil, 400},
		"a name without end":              {"GET", "http://127.0.0.1/search?q=" + strings.Repeat("a", 1000), nil, 400},
	} {
		t.Run(name, func(t *testing.T) {
			r := get(h, tt.method, tt.url, tt.header)
			if tt.url[0] == '/' { // httptest names a host of its own
				req := httptest.NewRequest(tt.method, tt.url, nil)
				req.Host = ""
				r = httptest.NewRecorder()
				h.ServeHTTP(r, req)
			}
			if r.Code != tt.want {
				t.Errorf("status %d, want %d: %.200s", r.Code, tt.want, r.Body)
			}
			if r.Code == 200 {
				for _, header := range []string{"Content-Security-Policy", "X-Content-Type-Options", "Cross-Origin-Resource-Policy"} {
					if r.Header().Get(header) == "" {
						t.Errorf("no header %s", header)
					}
				}
			}
		})
	}
}

func TestTheAnswersAreThoseOfTheCommands(t *testing.T) {
	h := newCluster(t, 30, 50).page().Handler()
	answer := func(path string, q url.Values, out any) {
		t.Helper()
		r := get(h, "GET", "http://127.0.0.1/"+path+"?"+q.Encode(), nil)
		if err := json.Unmarshal(r.Body.Bytes(), out); r.Code != 200 || err != nil {
			t.Fatalf("%s: status %d, %v: %.300s", path, r.Code, err, r.Body)
		}
	}
	var way operator.Way
	pod := teams[2] + "/" + egressName(2) + "-00"
	if answer("trace", url.Values{"pod": {pod}}, &way); way.Status != 0 || !strings.HasPrefix(way.Verdict, "As the kernels of its nodes tell") || !strings.Contains(way.Verdict, "as "+egressIP(2).String()+" by gateway node-3") {
		t.Errorf("the verdict is %d, %q", way.Status, way.Verdict)
	}
	for _, tt := range []struct{ to, protocol, port, want string }{
		{"198.51.100.9", "udp", "53", "198.51.100.9 port 53 (udp) is outside"},
		{"198.51.100.9", "", "443", "198.51.100.9 port 443 (tcp) is outside"},
		{"", "gre", "", "gre has no ports"},
		{"10.10.0.1", "udp", "8479", "an address of node node-1, is the overlay's"},
	} {
		way = operator.Way{}
		answer("trace", url.Values{"pod": {pod}, "to": {tt.to}, "protocol": {tt.protocol}, "port": {tt.port}}, &way)
		if !slices.ContainsFunc(way.Steps, func(s operator.Step) bool { return strings.Contains(s.Text, tt.want) }) {
			t.Errorf("to %s by %s for %s: %+v; %q is not there", tt.to, tt.protocol, tt.port, way.Steps, tt.want)
		}
	}
	var d description
	if answer("describe", url.Values{"kind": {"egress"}, "name": {egressName(2)}}, &d); len(d.Pods) != 6 || len(d.Rows) < 4 || d.Pods[0].Kind != "pod" {
		t.Errorf("described as %+v", d)
	}
	if answer("describe", url.Values{"kind": {"ip"}, "name": {egressIP(2).String()}}, &d); len(d.Pods) != 6 || !strings.Contains(fmt.Sprint(d.Rows), "History") {
		t.Errorf("described as %+v", d)
	}
	for text, want := range map[string]operator.Hit{
		"NODE-7":             {Kind: "node", Name: "node-7"},
		egressIP(3).String(): {Kind: "ip", Name: egressIP(3).String()},
		egressName(4):        {Kind: "egress", Name: egressName(4)},
		egressName(4) + "-2": {Kind: "pod", Name: teams[4] + "/" + egressName(4) + "-20"},
		"10.10.0.9":          {Kind: "node", Name: "node-9"},
		pod:                  {Kind: "pod", Name: pod},
	} {
		var hits []operator.Hit
		if answer("search", url.Values{"q": {text}}, &hits); len(hits) == 0 || len(hits) > maxHits || hits[0].Kind != want.Kind || hits[0].Name != want.Name {
			t.Errorf("%s finds %.3v first, want %v", text, hits, want)
		}
	}
	var none []operator.Hit
	if answer("search", url.Values{"q": {"nothing like this"}}, &none); none == nil || len(none) > 0 {
		t.Errorf("found %v, want an empty list", none)
	}
}

// follow reads changes, and gives them to each until it says that it has seen enough.
func follow(t *testing.T, url string, each func(Change) bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, "GET", url+"/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	lines := bufio.NewScanner(answer.Body)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		text, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		var c Change
		if err := json.Unmarshal([]byte(text), &c); err != nil {
			t.Fatal(err)
		}
		if each(c) {
			return
		}
	}
	t.Fatalf("the events ended: %v", lines.Err())
}

func TestAViewerGetsTheWholeAndThenWhatChanges(t *testing.T) {
	c := newCluster(t, 3, 400)
	server := httptest.NewServer(c.page().Handler())
	t.Cleanup(server.Close)
	nodes, whole, moved := 0, false, false
	follow(t, server.URL, func(got Change) bool {
		switch {
		case !whole:
			nodes += len(got.Put[kindNode])
			if whole = !got.More; whole {
				if nodes != 400 {
					t.Errorf("the whole has %d nodes", nodes)
				}
				c.own(1, "node-300", time.Now())
				c.flush()
			}
		default:
			moved = strings.Contains(string(got.Put[kindEgress][egressName(1)]), `"gateway":"node-300"`)
			if n := len(got.Put[kindNode]); n > 2 {
				t.Errorf("%d nodes changed, want the two of the move", n)
			}
		}
		return moved
	})
}

func TestAThousandViewersCostNoMoreThanTheMost(t *testing.T) {
	server := httptest.NewServer(newCluster(t, 3, 5).page().Handler())
	t.Cleanup(server.Close)
	answers := make(chan int)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	client := &http.Client{Transport: &http.Transport{MaxConnsPerHost: 200}}
	t.Cleanup(client.CloseIdleConnections)
	for range 1000 {
		go func() {
			r, _ := http.NewRequestWithContext(ctx, "GET", server.URL+"/events", nil) // the URL is one
			a, err := client.Do(r)
			if err != nil {
				answers <- 0
				return
			}
			answers <- a.StatusCode
			if a.StatusCode == 200 {
				<-ctx.Done()
			} else {
				_, _ = io.Copy(io.Discard, a.Body) // it says why
			}
			_ = a.Body.Close() // it was read
		}()
	}
	n := map[int]int{}
	for range 1000 {
		n[<-answers]++
	}
	if n[200] != maxViewers || n[503] != 1000-maxViewers {
		t.Errorf("answers by status: %v, want %d of 200, and else 503", n, maxViewers)
	}
}

// An attempt: a client opens the page as often as it can, so that nobody else sees it.
func TestAClientWithManyViewersKeepsNobodyOut(t *testing.T) {
	p := known()
	join := func(last byte) (*viewer, error) {
		return p.join(t.Context(), connlimit.Client(netip.AddrFrom4([4]byte{192, 0, 2, last})))
	}
	var first *viewer
	for i := range maxViewers {
		v, err := join(1)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = v
		}
	}
	if _, err := join(1); !errors.Is(err, errTooMany) {
		t.Errorf("one more of it: %v, want %v", err, errTooMany)
	}
	for i := range maxViewers / 2 {
		if _, err := join(2); err != nil {
			t.Fatalf("viewer %d of another client: %v", i, err)
		}
	}
	<-first.events // the whole
	if _, open := <-first.events; open {
		t.Error("the oldest viewer of the client that has most is still there")
	}
	for last := byte(1); last <= 2; last++ { // a browser comes again when its stream has ended
		if _, err := join(last); !errors.Is(err, errTooMany) || len(p.viewers) != maxViewers {
			t.Errorf("one more of client %d: %v, and there are %d viewers; want %v, and %d", last, err, len(p.viewers), errTooMany, maxViewers)
		}
	}
	if _, err := join(3); err != nil {
		t.Errorf("a third client: %v", err)
	}
}

func TestAViewerThatDoesNotReadIsDroppedAndNoOtherWaits(t *testing.T) {
	p := newCluster(t, 3, 5).page()
	slow, err := p.join(t.Context(), netip.Prefix{})
	if err != nil {
		t.Fatal(err)
	}
	quick, err := p.join(t.Context(), netip.Prefix{})
	if err != nil {
		t.Fatal(err)
	}
	<-quick.events // the whole
	for i := range 2 * maxBehind {
		now, err := p.current(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := p.show(&shown{whole: now.whole, tenures: now.tenures, State: state(map[string]string{"node a": fmt.Sprint(i)})}); err != nil {
			t.Fatal(err)
		}
		if text := string(<-quick.events); !strings.Contains(text, fmt.Sprintf(`"a":%d`, i)) {
			t.Fatalf("change %d came as %s", i, text)
		}
	}
	n := 0
	for range slow.events { // it ends, since the channel was closed
		n++
	}
	if n != maxBehind {
		t.Errorf("%d changes waited for who does not read, want %d at most", n, maxBehind)
	}
	p.leave(slow)
	p.leave(quick)
	if len(p.viewers) != 0 {
		t.Errorf("%d viewers are left", len(p.viewers))
	}
}

func TestNothingIsReadOfEtcdWhileNobodyLooks(t *testing.T) {
	c := newCluster(t, 3, 5)
	p := c.page()
	if p.shown != nil {
		t.Error("etcd was read before anybody looked")
	}
	if r := get(p.Handler(), "GET", "http://127.0.0.1/state", nil); r.Code != 200 {
		t.Fatalf("status %d", r.Code)
	}
	p.mu.Lock()
	p.looked = time.Now().Add(-linger)
	p.mu.Unlock()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		p.mu.Lock()
		shown := p.shown
		p.mu.Unlock()
		if shown == nil {
			break
		} else if time.Now().After(end) {
			t.Fatal("etcd is still followed")
		}
	}
	c.put(store.NodeKey("late"), egress.Node{Name: "late", Index: 99})
	c.flush()
	if r := get(p.Handler(), "GET", "http://127.0.0.1/state", nil); !strings.Contains(r.Body.String(), `"late"`) {
		t.Errorf("who looks again sees what was: %.300s", r.Body)
	}
}

func until(t *testing.T, f func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("it did not come true")
		}
	}
}

// A panic would end crdsync, and anew whenever somebody looks at what causes it.
func TestThePageSurvivesAPanicAndTellsIt(t *testing.T) {
	c := newCluster(t, 3, 5)
	var log syncbuf.Buffer
	p := New(c.client, Agents{}, slog.New(slog.NewTextHandler(&log, nil)))
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	h := p.Handler()
	if r := get(h, "GET", "http://127.0.0.1/state", nil); r.Code != 200 {
		t.Fatalf("status %d", r.Code)
	}
	broken := &viewer{events: make(chan []byte)}
	close(broken.events) // whoever sends to it panics
	p.mu.Lock()
	p.viewers = append(p.viewers, broken)
	p.mu.Unlock()
	c.put(store.EgressKey("another"), egress.Policy{Name: "another"})
	c.flush()
	until(t, func() bool { return strings.Contains(log.String(), "closed channel") })
	until(t, func() bool {
		r := get(h, "GET", "http://127.0.0.1/state", nil)
		return r.Code == 200 && strings.Contains(r.Body.String(), `"another"`)
	})
	stop()
	if err := <-done; err != nil || strings.Count(log.String(), "level=ERROR") != 1 {
		t.Errorf("it ended with %v and the log\n%s", err, log.String())
	}
}
