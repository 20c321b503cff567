package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	"golang.org/x/net/dns/dnsmessage"

	"github.com/egret-project/egret/internal/port"
)

// move moves data of a member.
func (i *installation) move(from, to string) {
	i.Helper()
	if err := os.Rename(from, to); err != nil {
		i.Fatal(err)
	}
}

// refuses checks that a member ends by itself with an error that says all of want.
func (i *installation) refuses(n int, args []string, want ...string) {
	i.Helper()
	ctx, cancel := context.WithTimeout(i.Context(), patience)
	defer cancel()
	err := i.run(ctx, n, args...)
	for _, text := range want {
		if err == nil || !strings.Contains(err.Error(), text) {
			i.Errorf("member %d ended with %v: want an error that names %s", n, err, text)
		}
	}
}

// ids returns the ids of the cluster and of its members, by name.
func (i *installation) ids(by int) (cluster uint64, members map[string]uint64) {
	i.Helper()
	c := i.client(by)
	defer c.Close()
	r, err := c.MemberList(i.Context())
	if err != nil {
		i.Fatal(err)
	}
	members = map[string]uint64{}
	for _, m := range r.Members {
		members[m.Name] = m.ID
	}
	return r.Header.ClusterId, members
}

func TestAMemberWhoseDataIsLostJoinsAnew(t *testing.T) {
	t.Parallel()
	i := certified(t)
	i.start()
	i.put(0, "kept", "1")
	i.root(0)
	_, before := i.ids(0)
	away := func(n int) string { return filepath.Join(i.dir, fmt.Sprint("away-", n)) }
	i.stops[1]()
	i.move(i.data(1), away(1))
	i.refuses(1, []string{"--root-certs", i.TempDir()}, "reading --root-certs")
	i.startOne(1)
	i.put(1, "served", "1")
	if got := i.get(1, "kept"); got != "1" {
		t.Errorf("the member without data has %q", got)
	}
	_, after := i.ids(0)
	if len(after) != 3 || after["egret-etcd-1"] == before["egret-etcd-1"] || after["egret-etcd-2"] != before["egret-etcd-2"] {
		t.Errorf("the members are %x, and were %x: want another id of the one alone", after, before)
	}
	if err := i.run(t.Context(), 1, "--data-dir", filepath.Join(i.dir, "by-hand", "egret-etcd-1")); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("another process as a member that serves: %v", err)
	}

	// What was lost is found: it is of no use, and the others go on. The kubelet starts the member again, which joins them.
	i.stops[1]()
	i.move(i.data(1), away(1)+"-new")
	i.move(away(1), i.data(1))
	i.refuses(1, nil, i.data(1), "removed", "the next start joins")
	i.put(0, "kept", "2")
	if found, err := filepath.Glob(filepath.Join(i.data(1), "removed-*", "wal", "*.wal")); err != nil || len(found) == 0 {
		t.Errorf("the data that was found is not beside its place: %v", err)
	}
	i.startOne(1)
	i.put(1, "served", "2")
	if got := i.get(1, "kept"); got != "2" {
		t.Errorf("the member without data has %q", got)
	}

	// Of two without data none gets in, and nothing begins anew, until the data of one is there.
	i.stops[1]()
	i.stops[2]()
	i.move(i.data(1), away(1)+"-third")
	i.move(i.data(2), away(2))
	i.refuses(1, nil, i.data(1), "--restore-from")
	i.refuses(2, nil, i.data(2), "--restore-from")
	i.move(away(2), i.data(2))
	i.startOne(2, "--root-certs", i.TempDir()) // only who joins goes by it
	i.put(2, "kept", "3")
	i.startOne(1)
	i.put(1, "served", "3")
	if got := i.get(1, "kept"); got != "3" {
		t.Errorf("the member without data has %q", got)
	}
}

// root has etcd hold its clients to their roles: root alone changes who is a member.
func (i *installation) root(n int) {
	i.Helper()
	c := i.client(n)
	defer c.Close()
	for _, do := range []func() error{
		func() error {
			_, err := c.UserAddWithOptions(i.Context(), "root", "", &clientv3.UserAddOptions{NoPassword: true})
			return err
		},
		func() error { _, err := c.UserGrantRole(i.Context(), "root", "root"); return err },
		func() error { _, err := c.AuthEnable(i.Context()); return err },
	} {
		if err := do(); err != nil {
			i.Fatal(err)
		}
	}
}

// One member that is to become three would be two etcds: that of the one, and that of the two others.
func TestAMemberThatTheOthersDoNotKnowDoesNotBegin(t *testing.T) {
	t.Parallel()
	i := certified(t)
	i.startOne(0, "--initial-cluster", "egret-etcd-0=https://"+i.at(i.peers[0]))
	i.put(0, "kept", "1")
	for n := 1; n <= 2; n++ {
		i.refuses(n, nil, i.at(i.peers[0]), "etcd.bundled.replicas")
		if has, err := hasData(i.data(n)); has || err != nil {
			t.Errorf("member %d has begun: %v", n, err)
		}
	}
	if got := i.get(0, "kept"); got != "1" {
		t.Errorf("the one member has %q", got)
	}
}

func TestARestoredClusterIsNotThatOfBefore(t *testing.T) {
	t.Parallel()
	i := certified(t)
	i.start()
	i.put(0, "kept", "1")
	before, _ := i.ids(0)
	file := i.snapshot("--dir", i.dir, "--endpoints", i.endpoint(0))
	i.stop()
	i.move(filepath.Join(i.dir, "data"), filepath.Join(i.dir, "old"))
	i.start("--restore-from", file)
	i.put(0, "kept", "2")
	if after, _ := i.ids(0); after == before {
		t.Errorf("the cluster has the id of before, %x", after)
	}

	// A node that was dead comes back with data of before.
	i.stops[1]()
	restored := filepath.Join(i.dir, "restored-1")
	i.move(i.data(1), restored)
	i.move(filepath.Join(i.dir, "old", "node-1", "egret-etcd-1"), i.data(1))
	i.refuses(1, nil, i.data(1), "of cluster", "move the data away")
	if err := os.RemoveAll(i.data(1)); err != nil {
		t.Fatal(err)
	}
	// The option is still there, and the cluster has gone on since: the snapshot is of the past.
	i.refuses(1, []string{"--restore-from", file}, "--restore-from "+file, "leave the option out")
	i.startOne(1)
	i.put(1, "served", "1")
	if got := i.get(1, "kept"); got != "2" {
		t.Errorf("the member without data has %q", got)
	}
}

// One node was away while the others were restored, or the one that was restored by mistake.
func TestOneMemberOfAnotherClusterIsInNobodysWay(t *testing.T) {
	t.Parallel()
	i := certified(t)
	i.start()
	i.stop()
	asked := make(chan struct{})
	pair, err := tls.LoadX509KeyPair(filepath.Join(i.dir, "egret-etcd-server", "tls.crt"), filepath.Join(i.dir, "egret-etcd-server", "tls.key"))
	if err != nil {
		t.Fatal(err)
	}
	listen, err := tls.Listen("tcp", i.at(i.peers[2]), &tls.Config{Certificates: []tls.Certificate{pair}})
	if err != nil {
		t.Fatal(err)
	}
	stranger := &http.Server{ErrorLog: log.New(io.Discard, "", 0), Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Etcd-Cluster-ID", "1")
		if r.URL.Path != "/members" {
			w.WriteHeader(http.StatusPreconditionFailed) // as etcd does
			return
		}
		select {
		case asked <- struct{}{}:
		case <-r.Context().Done():
		}
		fmt.Fprintf(w, `[{"id": 1, "peerURLs": ["https://%s"], "name": "egret-etcd-2"}]`, i.at(i.peers[2]))
	})}
	done := make(chan struct{})
	t.Cleanup(func() { stranger.Close(); <-done })
	go func() { defer close(done); _ = stranger.Serve(listen) }() // until it is closed
	i.startOne(0)
	for n := range 2 { // it asks again: it has not ended
		select {
		case <-asked:
		case <-time.After(patience):
			t.Fatalf("a member that is not ready has asked the others %d times: want another", n)
		}
	}
	go func() {
		for {
			select {
			case <-asked:
			case <-done:
				return
			}
		}
	}()
	i.startOne(1)
	i.put(0, "served", "0")
	i.put(1, "served", "1")
}

// A member without data whose node has come up before its network does not know whether the others have data.
func TestAMemberWithoutDataWaitsUntilItKnowsOfTheOthers(t *testing.T) {
	t.Parallel()
	i := certified(t)
	stranger, err := net.Listen("tcp", i.at(i.peers[1])) // who connects waits, as for a node that is off
	if err != nil {
		t.Fatal(err)
	}
	i.startOne(0)
	for n := range 2 {
		c, err := stranger.Accept()
		if err != nil {
			t.Fatal(err)
		}
		c.Close()
		if has, err := hasData(i.data(0)); has || err != nil {
			t.Fatalf("after %d questions to another member it begins without an answer: %v", n+1, err)
		}
	}
	stranger.Close()
	i.startOne(1)
	i.put(0, "served", "0")
	i.put(1, "served", "1")
}

// After a power cut nodes refuse connections until their pods are there, and a member whose disk was lost may be first.
func TestAMemberWithoutDataWaitsForOthersThatStartLater(t *testing.T) {
	for _, restore := range []string{"", "/none"} {
		own, err := net.Listen("tcp", "127.0.0.1:0") // it asks there, too
		if err != nil {
			t.Fatal(err)
		}
		defer own.Close()
		other := fmt.Sprint("127.0.0.1:", port.Hold(t))
		m := member{name: "a", dataDir: filepath.Join(t.TempDir(), "a"), restore: restore}
		m.initialCluster = fmt.Sprintf("a=https://%s,b=https://%s", own.Addr(), other)
		cfg := embed.NewConfig()
		cfg.AdvertisePeerUrls, cfg.ZapLoggerBuilder = []url.URL{{Scheme: "https", Host: own.Addr().String()}}, embed.NewZapLoggerBuilder(zap.NewNop())
		if err := cfg.ZapLoggerBuilder(cfg); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- m.begin(t.Context(), cfg); own.Close() }()
		asked := 0
		for c, err := own.Accept(); err == nil; c, err = own.Accept() {
			if asked++; asked == silentFor/2 {
				stranger, err := net.Listen("tcp", other)
				if err != nil {
					t.Fatal(err)
				}
				go func() { // one that says nothing may have data
					if c, err := stranger.Accept(); err == nil {
						c.Close()
					}
					stranger.Close()
				}()
			}
			c.Close()
		}
		if err := <-ended; restore == "" && err != nil {
			t.Errorf("it does not begin: %v", err)
		}
		if want := silentFor/2 + silentFor; asked < want {
			t.Errorf("--restore-from %q: it begins when it has asked %d times, and another one was there in between: want %d at least", restore, asked, want)
		}
	}
}

// One alone has nobody to wait for.
func TestTheOnlyMemberBeginsAtOnce(t *testing.T) {
	own := net.JoinHostPort("127.0.0.1", fmt.Sprint(port.Hold(t)))
	m := member{name: "a", dataDir: filepath.Join(t.TempDir(), "a"), initialCluster: "a=https://" + own}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	before := pause
	defer func() { pause = before }()
	pause = patience
	if err := m.begin(ctx, embed.NewConfig()); err != nil {
		t.Error(err)
	}
}

func TestWhoIsKnownNotToServe(t *testing.T) {
	for name, tt := range map[string]struct {
		err  error
		down bool
	}{
		"its node refuses":                   {&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}, true},
		"its node is off":                    {&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.EHOSTUNREACH)}, false},
		"a DNS that knows no name":           {&net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", IsNotFound: true}}, false},
		"the cluster's DNS does not answer":  {&net.OpError{Op: "dial", Err: &net.DNSError{Err: "i/o timeout", IsTimeout: true}}, false},
		"the cluster's DNS has no endpoints": {&net.DNSError{Err: "connection refused", UnwrapErr: syscall.ECONNREFUSED}, false},
		"it shows another certificate":       {errors.New("x509: certificate signed by unknown authority"), false},
	} {
		if got := isDown(tt.err); got != tt.down {
			t.Errorf("%s: known not to serve is %t, want %t", name, got, tt.down)
		}
	}
}

// What the DNS outside of the cluster says, which gets the names as they are, is no word on who has a pod.
func TestWhoIsKnownToHaveNoPod(t *testing.T) {
	const (
		own, peer = "a.peers.egret-system.svc", "b.peers.egret-system.svc"
		domain    = ".cluster.local"
		serverBad = dnsmessage.RCodeServerFailure
		noName    = dnsmessage.RCodeNameError
		found     = dnsmessage.RCodeSuccess
	)
	for name, tt := range map[string]struct {
		self, peer, outside dnsmessage.RCode
		want                bool
	}{
		"it has no pod": {found, noName, noName, true},
		"it has no pod, and the DNS outside is down": {found, noName, serverBad, true},
		"it has a pod": {found, found, noName, false},
		"the cluster's DNS fails for it, and not that outside":  {found, serverBad, noName, false},
		"the cluster's DNS fails, and not that outside":         {serverBad, serverBad, noName, false},
		"the cluster's DNS does not have this member's pod yet": {noName, noName, noName, false},
	} {
		// The resolver goes by the domains of this machine: the cluster's DNS leads it to the whole name.
		r := resolver(t, map[string]dnsmessage.RCode{own + ".": tt.self, own + domain + ".": tt.self, peer + ".": tt.outside, peer + domain + ".": tt.peer},
			map[string]string{own + ".": own + domain + "."})
		if got := hasNoPod(t.Context(), r, "https://"+own+":8484", "https://"+peer+":8484"); got != tt.want {
			t.Errorf("%s: known to have none is %t, want %t", name, got, tt.want)
		}
	}
	r := resolver(t, nil, nil)
	if hasNoPod(t.Context(), r, "https://127.0.0.1:1", "https://127.0.0.1:2") {
		t.Error("an address counts as a member without a pod")
	}
}

// resolver returns one of a DNS with these codes, and IPv4 addresses where they are of success; aliases lead to others.
func resolver(t *testing.T, codes map[string]dnsmessage.RCode, aliases map[string]string) *net.Resolver {
	t.Helper()
	server, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	t.Cleanup(func() { server.Close(); <-done })
	go func() {
		defer close(done)
		b := make([]byte, 1500)
		for {
			n, from, err := server.ReadFrom(b)
			if err != nil {
				return // closed
			}
			var m dnsmessage.Message
			if err := m.Unpack(b[:n]); err != nil {
				t.Error(err)
				return
			}
			q, ok := m.Questions[0], false
			m.Response, m.RecursionAvailable, m.Additionals = true, true, nil
			name := q.Name.String()
			if m.RCode, ok = codes[name]; !ok {
				m.RCode = dnsmessage.RCodeNameError
			}
			if m.RCode == dnsmessage.RCodeSuccess {
				if to, ok := aliases[name]; ok {
					name = to
					m.Answers = append(m.Answers, dnsmessage.Resource{
						Header: dnsmessage.ResourceHeader{Name: q.Name, Class: dnsmessage.ClassINET}, Body: &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(to)},
					})
				}
				if q.Type == dnsmessage.TypeA {
					m.Answers = append(m.Answers, dnsmessage.Resource{
						Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name), Class: dnsmessage.ClassINET}, Body: &dnsmessage.AResource{A: [4]byte{10, 0, 0, 1}},
					})
				}
			}
			out, err := m.Pack()
			if err == nil {
				_, err = server.WriteTo(out, from)
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	}()
	return &net.Resolver{PreferGo: true, StrictErrors: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "udp", server.LocalAddr().String())
	}}
}
