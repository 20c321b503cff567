package monitor

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/egret-project/egret/internal/port"
	"github.com/egret-project/egret/internal/syncbuf"
)

// gatherer counts how often it is asked.
type gatherer struct {
	*prometheus.Registry
	asked atomic.Int32
	hold  chan struct{} // nil: it answers at once
}

func (g *gatherer) Gather() ([]*dto.MetricFamily, error) {
	g.asked.Add(1)
	if g.hold != nil {
		<-g.hold
	}
	return g.Registry.Gather()
}

func newGatherer() *gatherer {
	g := &gatherer{Registry: prometheus.NewRegistry()}
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: "egret_claims_total", Help: "Claims."})
	c.Add(7)
	g.MustRegister(c)
	return g
}

// start runs a server at a loopback address until the test ends.
func start(t *testing.T, register func(*Server)) (address string, g *gatherer) {
	t.Helper()
	g = newGatherer()
	address = fmt.Sprintf("127.0.0.1:%d", port.Hold(t))
	s := New(Config{Local: address, Metrics: g})
	register(s)
	run(t, s)
	await(t, func() bool { _, _, err := get(address, "/healthz"); return err == nil })
	return address, g
}

func run(t *testing.T, s *Server) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the server ended with %v", err)
		}
	})
}

func await(t *testing.T, f func() bool) {
	t.Helper()
	for until := time.Now().Add(20 * time.Second); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatal("it did not come true")
		}
	}
}

func get(address, path string) (int, string, error) {
	return ask(http.DefaultClient, "http://"+address+path)
}

func ask(c *http.Client, url string) (int, string, error) {
	r, err := c.Get(url)
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r.StatusCode, string(b), err
}

func want(t *testing.T, address, path string, code int, text string) {
	t.Helper()
	got, body, err := get(address, path)
	if err != nil || got != code || !strings.Contains(body, text) {
		t.Errorf("GET %s: %d %q, %v; want %d and %q", path, got, body, err, code, text)
	}
}

func TestAnswersAreByWhatIsRegistered(t *testing.T) {
	t.Parallel()
	var live, ready atomic.Bool
	by := func(b *atomic.Bool, text string) func() error {
		return func() error {
			if !b.Load() {
				return errors.New(text)
			}
			return nil
		}
	}
	live.Store(true)
	address, _ := start(t, func(s *Server) {
		s.Live("loop", by(&live, "no pass for 1m0s"))
		s.Ready("etcd", by(&ready, "no answer"))
		s.Ready("kernel", by(&ready, "no tables"))
	})
	want(t, address, "/healthz", 200, "ok\n")
	want(t, address, "/readyz", 503, "etcd: no answer\nkernel: no tables\n")
	live.Store(false)
	ready.Store(true)
	want(t, address, "/healthz", 503, "loop: no pass for 1m0s\n")
	want(t, address, "/readyz", 200, "ok\n")
	want(t, address, "/metrics", 200, "# TYPE egret_claims_total counter\negret_claims_total 7\n")
}

func TestNothingIsRegisteredNothingIsWrong(t *testing.T) {
	t.Parallel()
	address, _ := start(t, func(*Server) {})
	want(t, address, "/healthz", 200, "ok\n")
	want(t, address, "/readyz", 200, "ok\n")
}

func TestACheckThatHangsOrPanicsIsAnAnswer(t *testing.T) {
	t.Parallel()
	hang, asked := make(chan struct{}), atomic.Int32{}
	defer close(hang)
	address, _ := start(t, func(s *Server) {
		s.Live("stuck", func() error { asked.Add(1); <-hang; return nil })
		s.Live("wild", func() error { panic("no map") })
		s.Live("well", func() error { return nil })
	})
	begin := time.Now()
	for range 2 {
		want(t, address, "/healthz", 503, "stuck: no answer within 800ms\nwild: the check panicked\n")
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("two answers took %v", took)
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("a check that has not returned was asked %d times; want 1", n)
	}
	want(t, address, "/readyz", 200, "ok")
}

func TestOnlyQuestionsAreAnswered(t *testing.T) {
	t.Parallel()
	address, g := start(t, func(*Server) {})
	for _, method := range []string{"POST", "PUT", "DELETE", "PATCH", "OPTIONS", "CONNECT"} {
		for _, path := range []string{"/healthz", "/readyz", "/metrics"} {
			r, err := http.NewRequest(method, "http://"+address+path, strings.NewReader("drain node-1"))
			if err != nil {
				t.Fatal(err)
			}
			a, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			a.Body.Close()
			if a.StatusCode < 400 {
				t.Errorf("%s %s: %s", method, path, a.Status)
			}
		}
	}
	for _, path := range []string{"/", "/debug/pprof/", "/metrics/", "/healthz/x", "/../etc/passwd"} {
		if code, _, err := get(address, path); err != nil || code != 404 {
			t.Errorf("GET %s: %d, %v; want 404", path, code, err)
		}
	}
	if n := g.asked.Load(); n != 0 {
		t.Errorf("metrics were gathered %d times for what was no question", n)
	}
}

func TestManyQuestionsAreOneLook(t *testing.T) {
	t.Parallel()
	address, g := start(t, func(*Server) {})
	begin := time.Now()
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			for range 10 {
				_, _, _ = get(address, "/metrics") // one of too many connections is closed
			}
		})
	}
	all.Wait()
	if n, most := g.asked.Load(), int32(time.Since(begin)/freshFor)+1; n == 0 || n > most {
		t.Errorf("200 questions in %v were %d looks; want 1 to %d", time.Since(begin), n, most)
	}
}

func TestALookThatHangsHoldsUpNoOtherPage(t *testing.T) {
	t.Parallel()
	address, g := start(t, func(*Server) {})
	g.hold = make(chan struct{})
	var stuck sync.WaitGroup
	stuck.Go(func() { _, _, _ = get(address, "/metrics") })
	await(t, func() bool { return g.asked.Load() == 1 })
	want(t, address, "/healthz", 200, "ok")
	want(t, address, "/metrics", 503, "ask again")
	close(g.hold)
	stuck.Wait()
	want(t, address, "/metrics", 200, "egret_claims_total 7")
}

// An attempt: someone on the node opens connections and says nothing, says it a byte at a time, or reads nothing of the
// answer.
func TestWhoeverHoldsConnectionsKeepsNobodyFromAnswers(t *testing.T) {
	t.Parallel()
	address, _ := start(t, func(*Server) {})
	var held []net.Conn
	for i := range 5 * maxLocal {
		c, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		switch i % 3 {
		case 1:
			_, _ = io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\nX-Slow: ") // refused when it is one too many
		case 2:
			_, _ = io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
		}
		held = append(held, c)
	}
	for range 10 {
		want(t, address, "/healthz", 200, "ok")
		want(t, address, "/metrics", 200, "egret_claims_total 7")
	}
	// Each of them ends by itself.
	for _, c := range held {
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.Copy(io.Discard, c); errors.Is(err, context.DeadlineExceeded) || isTimeout(err) {
			t.Fatalf("a connection that says nothing is open after 20s")
		}
	}
}

func isTimeout(err error) bool {
	var t net.Error
	return errors.As(err, &t) && t.Timeout()
}

func TestAHeaderWithoutEndIsCutOff(t *testing.T) {
	t.Parallel()
	address, _ := start(t, func(*Server) {})
	c, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	go func() {
		_, _ = io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: x\r\nX-Long: ")
		for line := strings.Repeat("x", 1024); ; {
			if _, err := io.WriteString(c, line); err != nil {
				return
			}
		}
	}()
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	line, err := bufio.NewReader(c).ReadString('\n')
	if err == nil && !strings.Contains(line, "431") || isTimeout(err) {
		t.Errorf("the answer is %q, %v; want 431 or the end of the connection", line, err)
	}
}

func TestAPanicOfAPageIsToldOnceAndEndsNothing(t *testing.T) {
	t.Parallel()
	var log syncbuf.Buffer
	address := fmt.Sprintf("127.0.0.1:%d", port.Hold(t))
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		ServeLocal(ctx, address, maxLocal, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/" {
				panic("no map of " + r.URL.Path)
			}
		}), slog.New(slog.NewTextHandler(&log, nil)))
	}()
	t.Cleanup(func() { stop(); <-done })
	await(t, func() bool { _, _, err := get(address, "/"); return err == nil })
	for range 5 {
		if code, _, err := get(address, "/trace"); err == nil {
			t.Errorf("a page that panics is answered with %d", code)
		}
	}
	want(t, address, "/", 200, "")
	stop()
	<-done
	if got := log.String(); strings.Count(got, "level=ERROR") != 1 || !strings.Contains(got, "no map of /trace") ||
		!strings.Contains(got, "server_test.go") {
		t.Errorf("want one error with the panic and where it was, got %s", got)
	}
}

func TestATakenPortIsTriedAgain(t *testing.T) {
	t.Parallel()
	address := fmt.Sprintf("127.0.0.1:%d", port.Hold(t))
	other, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	run(t, New(Config{Local: address}))
	time.Sleep(200 * time.Millisecond) // it may try meanwhile; that it fails is nothing to see
	other.Close()
	await(t, func() bool { code, _, err := get(address, "/healthz"); return err == nil && code == 200 })
	want(t, address, "/metrics", 404, "")
}

func TestConfigThatMakesNoSenseIsNamed(t *testing.T) {
	for name, tt := range map[string]struct {
		cfg  Config
		want []string
	}{
		"for all the world":        {Config{Local: "0.0.0.0:8481"}, []string{"--status-address", "0.0.0.0:8481", "loopback", "--metrics-address"}},
		"a name":                   {Config{Local: "localhost:8481"}, []string{"localhost:8481"}},
		"no port":                  {Config{Local: "127.0.0.1"}, []string{"127.0.0.1"}},
		"port 0":                   {Config{Local: "127.0.0.1:0"}, []string{"127.0.0.1:0"}},
		"loopback for others":      {Config{Remote: "[::1]:8481"}, []string{"--metrics-address", "[::1]:8481"}},
		"brackets around a name":   {Config{Remote: "[n]:8481"}, []string{"--metrics-address", "[n]:8481"}},
		"loopback in brackets":     {Config{Remote: "[127.0.0.1]:8481"}, []string{"--metrics-address"}},
		"others without TLS":       {Config{Remote: "10.0.0.1:8481"}, []string{"--metrics-cert-file", "--metrics-client-ca-file"}},
		"others without a CA":      {Config{Remote: "10.0.0.1:8481", TLS: TLS{Cert: "a", Key: "b"}}, []string{"--metrics-client-ca-file"}},
		"the port is taken":        {Config{Local: "127.0.0.1:8481", Remote: "0.0.0.0:8481"}, []string{"--metrics-address", "0.0.0.0:8481", "127.0.0.1:8481", "another port"}},
		"both faults":              {Config{Local: "x", Remote: "y"}, []string{"--status-address", "--metrics-address", "--metrics-cert-file"}},
		"a file that is not there": {Config{Remote: "10.0.0.1:8481", TLS: TLS{Cert: "/none", Key: "/none", ClientCA: "/none"}}, []string{"/none", "--metrics-cert-file"}},
	} {
		t.Run(name, func(t *testing.T) {
			err := tt.cfg.Validate()
			for _, part := range tt.want {
				if err == nil || !strings.Contains(err.Error(), part) {
					t.Errorf("%v does not say %q", err, part)
				}
			}
		})
	}
	for _, cfg := range []Config{{}, {Local: "127.0.0.1:8481"}, {Local: "[::1]:8481"}} {
		if err := cfg.Validate(); err != nil {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
}
