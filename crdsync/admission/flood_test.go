package admission

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"

	"github.com/egret-project/egret/api/v1beta1"
	"github.com/egret-project/egret/egress"
	"github.com/egret-project/egret/internal/port"
)

// flooded is a webhook that serves, without certificates of clients.
type flooded struct {
	*testing.T
	*server
	trusted *tls.Config
}

func newFlooded(t *testing.T) *flooded {
	t.Helper()
	// What the webhook asks of an API server.
	pools := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, `{"apiVersion":"crd.antrea.io/v1beta1","kind":"ExternalIPPoolList","metadata":{},"items":[]}`) // who asked has gone
	}))
	t.Cleanup(pools.Close)
	dyn, err := dynamic.NewForConfig(&rest.Config{Host: pools.URL, QPS: 200, Burst: 400}) // as crdsync has it
	if err != nil {
		t.Fatal(err)
	}
	ours, err := newAuthority(time.Now(), nil)
	if err != nil {
		t.Fatal(err)
	}
	c, err := ours.serve(time.Now(), []string{"webhook"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	f := &flooded{T: t, trusted: &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "webhook", MinVersion: tls.VersionTLS12}}
	f.trusted.RootCAs.AddCert(ours.cert)
	listens := make(chan struct{})
	f.server = &server{dynamic: dyn, Config: Config{
		Address: fmt.Sprintf("127.0.0.1:%d", port.Hold(t)), Log: slog.New(slog.DiscardHandler), Answers: func() { close(listens) },
		InUse: func() ([]egress.Allocation, error) { return nil, nil },
	}}
	f.current.Store(c)
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- f.serve(ctx) }()
	t.Cleanup(func() {
		stop()
		<-ended // says that it was closed
	})
	select {
	case <-listens:
	case err := <-ended:
		t.Fatal(err)
	}
	return f
}

// dial connects with a source address.
func (f *flooded) dial(ctx context.Context, source string) (net.Conn, error) {
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(source)}}
	return d.DialContext(ctx, "tcp", f.Address)
}

// client is one that asks from an address, as an API server does.
func (f *flooded) client(source string) *http.Client {
	// an API server waits 5 s, and has a machine of its own
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{
		TLSClientConfig: f.trusted.Clone(), MaxIdleConnsPerHost: 25, IdleConnTimeout: 90 * time.Second,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return f.dial(ctx, source) },
	}}
}

func (f *flooded) ask(ctx context.Context, c *http.Client) error {
	pool := `{"metadata":{"name":"x"},"spec":{"ipRanges":[{"cidr":"10.1.0.0/24"}],"nodeSelector":{}}}`
	r, err := http.NewRequestWithContext(ctx, "POST", "https://"+f.Address+Path, bytes.NewReader(reviewOf(v1beta1.PoolResource.Resource, pool, "")))
	if err != nil {
		return err
	}
	answer, err := c.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	b, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusOK || !bytes.Contains(b, []byte(`"allowed":true`)) {
		return fmt.Errorf("answer %d, %s, %v", answer.StatusCode, b, err)
	}
	return nil
}

// speak connects, shakes hands and writes a text.
func (f *flooded) speak(ctx context.Context, source, text string) (net.Conn, error) {
	c, err := f.dial(ctx, source)
	if err != nil {
		return nil, err
	}
	t := tls.Client(c, f.trusted)
	if err := t.HandshakeContext(ctx); err != nil {
		_ = c.Close() // the server may have
		return nil, err
	}
	if _, err := io.WriteString(t, text); err != nil {
		_ = c.Close()
		return nil, err
	}
	return t, nil
}

// flood does something again and again, from one source after the other, and keeps the last connections of it open,
// held of them, until the test ends. It returns what is closed when there are as many.
func (f *flooded) flood(sources []string, held int, do func(ctx context.Context, source string) (net.Conn, error)) (full <-chan struct{}) {
	// 2,000 a second: who floods has no more of this machine than who is flooded
	const hands, rest = 4, 2 * time.Millisecond
	ctx, stop := context.WithCancel(f.Context())
	var flooding, filling sync.WaitGroup
	f.Cleanup(func() { stop(); flooding.Wait() })
	filling.Add(hands)
	var turn atomic.Int64
	for range hands {
		flooding.Go(func() {
			filled := sync.OnceFunc(filling.Done)
			defer filled()
			var open []net.Conn
			tick := time.NewTicker(rest)
			defer tick.Stop()
			for n := 1; ctx.Err() == nil; n++ {
				if n > held/hands {
					<-tick.C
				}
				c, err := do(ctx, sources[int(turn.Add(1))%len(sources)])
				if err == nil && c != nil {
					open = append(open, c)
				}
				if len(open) > held/hands {
					_ = open[0].Close() // the server may have
					open = open[1:]
				}
				if n == held/hands {
					filled()
				}
			}
			for _, c := range open {
				_ = c.Close()
			}
		})
	}
	all := make(chan struct{})
	go func() { filling.Wait(); close(all) }()
	return all
}

// An attempt: connections that are kept after requests that are no questions, so that bounds do not count them.
func TestNoConnectionIsKeptBesideTheBounds(t *testing.T) {
	f := newFlooded(t)
	for request, may := range map[string]int{
		// http.Server answers it by itself
		"OPTIONS * HTTP/1.1\r\nHost: webhook\r\n\r\n":                                maxArriving,
		"GET / HTTP/1.1\r\nHost: webhook\r\n\r\n":                                    0,
		"POST " + Path + " HTTP/1.1\r\nHost: webhook\r\nContent-Length: 2\r\n\r\n{}": 0,
	} {
		kept, most := make(chan bool), may+20
		var all []net.Conn
		for range most {
			c, err := f.speak(t.Context(), "127.0.0.1", request)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, c)
			b := make([]byte, 4)
			if _, err := io.ReadFull(c, b); err != nil || string(b) != "HTTP" {
				t.Fatalf("%q is answered with %q, %v", request, b, err)
			}
		}
		for _, c := range all {
			go func() {
				_ = c.SetReadDeadline(time.Now().Add(5 * time.Second)) // never fails for an open one
				_, err := io.Copy(io.Discard, c)
				kept <- errors.Is(err, os.ErrDeadlineExceeded)
				_ = c.Close()
			}()
		}
		n := 0
		for range most {
			if <-kept {
				n++
			}
		}
		if n > may {
			t.Errorf("after %q %d connections are kept, want %d at most", request, n, may)
		}
	}
}

// An attempt: pods and neighbours on the LAN that keep the API server from being answered, so that faulty objects are
// written. Some come with the address that the API server has: those of its node, where the CNI masquerades what they
// send to nodes.
func TestAFloodCostsAnAPIServerNoAnswer(t *testing.T) {
	const apiServer = "127.0.0.1"
	header := "POST " + Path + " HTTP/1.1\r\nHost: webhook\r\nContent-Length: 8000000\r\n"
	own := []string{apiServer}
	var many []string
	for i := range 150 {
		many = append(many, "127.0.1."+strconv.Itoa(i+1))
	}
	for name, tt := range map[string]func(f *flooded) (held int, do func(context.Context, string) (net.Conn, error)){
		"connections that say nothing": func(f *flooded) (int, func(context.Context, string) (net.Conn, error)) {
			return maxArriving + 50, f.dial
		},
		"handshakes that are begun": func(f *flooded) (int, func(context.Context, string) (net.Conn, error)) {
			return maxArriving + 50, func(ctx context.Context, source string) (net.Conn, error) {
				c, err := f.dial(ctx, source)
				if err == nil {
					_, _ = io.WriteString(c, "\x16\x03\x01\x02\x00\x01") // the server may have closed it
				}
				return c, err
			}
		},
		"handshakes, and nothing asked": func(f *flooded) (int, func(context.Context, string) (net.Conn, error)) {
			return maxArriving + 50, func(ctx context.Context, source string) (net.Conn, error) { return f.speak(ctx, source, "") }
		},
		"headers without an end": func(f *flooded) (int, func(context.Context, string) (net.Conn, error)) {
			return maxArriving + 50, func(ctx context.Context, source string) (net.Conn, error) { return f.speak(ctx, source, header) }
		},
		"questions without an end": func(f *flooded) (int, func(context.Context, string) (net.Conn, error)) {
			return maxAsking + 50, func(ctx context.Context, source string) (net.Conn, error) {
				return f.speak(ctx, source, header+"\r\n{")
			}
		},
		"questions as an API server asks them": func(f *flooded) (int, func(context.Context, string) (net.Conn, error)) {
			return 2 * maxResting, func(ctx context.Context, source string) (net.Conn, error) {
				c := f.client(source)
				dialled := make(chan net.Conn, 1)
				c.Transport.(*http.Transport).DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
					conn, err := f.dial(ctx, source)
					if err == nil {
						dialled <- conn // the one question of this client dials once
					}
					return conn, err
				}
				err := f.ask(ctx, c)
				select {
				case conn := <-dialled:
					return conn, err
				default: // who asks no more does not wait for the dialling
					return nil, err
				}
			}
		},
	} {
		for from, sources := range map[string][]string{"the address of the API server": own, "many addresses": many} {
			t.Run(name+", from "+from, func(t *testing.T) {
				f := newFlooded(t)
				kept := f.client(apiServer)
				var dials atomic.Int64
				kept.Transport.(*http.Transport).DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
					dials.Add(1)
					return f.dial(ctx, apiServer)
				}
				if err := f.ask(t.Context(), kept); err != nil {
					t.Fatal(err)
				}
				held, do := tt(f)
				full := f.flood(sources, held, do)
				asks := func() {
					anew := f.client(apiServer)
					anew.Transport.(*http.Transport).DisableKeepAlives = true
					if err := f.ask(t.Context(), kept); err != nil {
						t.Errorf("the API server, on a connection that it has: %v", err)
					}
					if err := f.ask(t.Context(), anew); err != nil {
						t.Errorf("the API server, on a new connection: %v", err)
					}
				}
				for flooding := true; flooding && !t.Failed(); asks() {
					select {
					case <-full:
						flooding = false
					default:
					}
				}
				for range 20 {
					if asks(); t.Failed() {
						break
					}
				}
				if n := dials.Load(); n != 1 {
					t.Errorf("the API server connected %d times, want to keep its connection", n)
				}
			})
		}
	}
}
