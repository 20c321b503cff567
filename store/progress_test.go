package store

import (
	"context"
	"errors"
	"net"
	"strconv"
	"sync/atomic"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/egret-project/egret/internal/etcdtest"
)

// front stands in front of an etcd and does with the responses of each stream of watches what a script says. etcd
// itself sends "watch created" and answers to progress requests in no order between them, and the first events of a
// watch that has something to catch up with up to 100 ms after "created", or later.
type front struct {
	pb.UnimplementedKVServer
	pb.UnimplementedWatchServer
	kv      pb.KVClient
	watch   pb.WatchClient
	streams atomic.Int64
	scripts []func(*relayed) error // of the first streams; the others are passed on as they are
}

// relayed is one stream of watches.
type relayed struct {
	responses <-chan *pb.WatchResponse // of etcd
	questions <-chan struct{}          // progress requests of the client, each passed on
	send      func(*pb.WatchResponse) error
	done      <-chan struct{} // the client is gone
}

var errGone = errors.New("the client is gone")

// next returns etcd's next response.
func (r *relayed) next() (*pb.WatchResponse, error) {
	select {
	case m, ok := <-r.responses:
		if !ok {
			return nil, errGone
		}
		return m, nil
	case <-r.done:
		return nil, errGone
	}
}

// pass passes responses on until one is as told, and returns that one. The answers to progress requests before it are
// kept, not passed on.
func (r *relayed) pass(last func(*pb.WatchResponse) bool) (answers []*pb.WatchResponse, is *pb.WatchResponse, err error) {
	for {
		m, err := r.next()
		switch {
		case err != nil:
			return nil, nil, err
		case last(m):
			return answers, m, nil
		case isAnswer(m):
			answers = append(answers, m)
		default:
			if err := r.send(m); err != nil {
				return nil, nil, err
			}
		}
	}
}

// stall lets nothing more through until the client has asked n more questions, which it does no longer when it has what
// it wants.
func (r *relayed) stall(n int) error {
	for len(r.questions) > 0 {
		<-r.questions
	}
	for range n {
		select {
		case <-r.questions:
		case <-r.done:
			return errGone
		}
	}
	return nil
}

func isAnswer(m *pb.WatchResponse) bool {
	return m.WatchId == clientv3.InvalidWatchID && !m.Created && !m.Canceled && len(m.Events) == 0
}

func isCreated(m *pb.WatchResponse) bool { return m.Created }

func (f *front) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	return f.kv.Range(ctx, r)
}

func (f *front) Put(ctx context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	return f.kv.Put(ctx, r)
}

func (f *front) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	return f.kv.Txn(ctx, r)
}

func (f *front) Watch(client pb.Watch_WatchServer) error {
	ctx, cancel := context.WithCancel(client.Context())
	defer cancel()
	etcd, err := f.watch.Watch(ctx)
	if err != nil {
		return err
	}
	questions, responses := make(chan struct{}, 1000), make(chan *pb.WatchResponse, 1000)
	go func() {
		for {
			m, err := client.Recv()
			if err != nil || etcd.Send(m) != nil {
				return
			}
			if m.GetProgressRequest() != nil {
				questions <- struct{}{}
			}
		}
	}()
	go func() {
		defer close(responses)
		for {
			m, err := etcd.Recv()
			if err != nil {
				return
			}
			responses <- m
		}
	}()
	r := &relayed{responses: responses, questions: questions, send: client.Send, done: ctx.Done()}
	if n := int(f.streams.Add(1)); n <= len(f.scripts) {
		if err := f.scripts[n-1](r); err != nil {
			return err
		}
	}
	for {
		m, err := r.next()
		if err != nil {
			return err
		}
		if err := r.send(m); err != nil {
			return err
		}
	}
}

// dialThrough connects a client to an etcd by a front with these scripts.
func dialThrough(t *testing.T, s *etcdtest.Server, scripts ...func(*relayed) error) *Client {
	t.Helper()
	conn := s.Client().ActiveConnection()
	f := &front{kv: pb.NewKVClient(conn), watch: pb.NewWatchClient(conn), scripts: scripts}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	pb.RegisterKVServer(server, f)
	pb.RegisterWatchServer(server, f)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := recv(t, "the front to end", served); err != nil {
			t.Error(err)
		}
	})
	return dialConfig(t, Config{Endpoints: []string{l.Addr().String()}})
}

// values returns the values of a cache, all of one revision.
func values(k *Cache) map[string]string {
	out := map[string]string{}
	for key, r := range k.List("") {
		out[key] = string(r.Value)
	}
	return out
}

// An answer to a progress request that was asked before the watch of a new range was created came after "created", and
// was believed.
func TestARangeThatIsWatchedAnewMissesNoChangeBehindAnOldAnswer(t *testing.T) {
	s := start(t)
	asked := make(chan struct{})
	c := dialThrough(t, s, func(r *relayed) error {
		_, answer, err := r.pass(isAnswer)
		if err != nil {
			return err
		}
		close(asked)
		more, created, err := r.pass(isCreated)
		if err != nil {
			return err
		}
		for _, m := range append([]*pb.WatchResponse{created, answer}, more...) {
			if err := r.send(m); err != nil {
				return err
			}
		}
		return r.stall(5)
	})
	put(t, c, "owners/1", "old")
	put(t, c, "pins/1", "old")
	k := tracked(t, c, OwnerPrefix, MovePrefix)
	put(t, c, "pins/1", "new")
	put(t, c, "owners/1", "new")
	recv(t, "the question how far the watches are", asked)
	k.Add(PinPrefix)
	until(t, "the owner", k.Changed(), func() bool {
		v := values(k)
		if v["owners/1"] == "new" && v["pins/1"] != "new" {
			t.Fatalf("at revision %d, after the pin was changed: %v", k.Revision(), v)
		}
		return v["owners/1"] == "new"
	})
}

// clientv3 sets up its watches one after the other on a new connection, and asks in between if it is told to.
func TestAWatchThatIsSetUpAgainMissesNoChangeBehindAnOldAnswer(t *testing.T) {
	s := start(t)
	asked, changed := make(chan struct{}), make(chan struct{})
	c := dialThrough(t, s,
		func(r *relayed) error {
			// and the client has an event that waits for it, so it asks on
			if _, _, err := r.pass(isAnswer); err != nil {
				return err
			}
			close(asked)
			<-changed
			return status.Error(codes.Unavailable, "the connection breaks")
		},
		func(r *relayed) error {
			created, err := r.next()
			if err != nil {
				return err
			}
			// The client has one watch, and the next is not yet to be created: that is when it asks.
			first := []*pb.WatchResponse{created}
			for !isAnswer(first[len(first)-1]) {
				m, err := r.next()
				if err != nil {
					return err
				}
				first = append(first, m)
			}
			answer := first[len(first)-1]
			for _, m := range first[:len(first)-1] {
				if err := r.send(m); err != nil {
					return err
				}
			}
			more, second, err := r.pass(isCreated)
			if err != nil {
				return err
			}
			for _, m := range append([]*pb.WatchResponse{second, answer}, more...) {
				if err := r.send(m); err != nil {
					return err
				}
			}
			return r.stall(5)
		})
	k := tracked(t, c, OwnerPrefix, MovePrefix)
	put(t, c, "owners/1", "1")
	recv(t, "the question how far the watches are", asked)
	if _, err := s.Client().Txn(t.Context()).Then(clientv3.OpPut(c.key("owners/2"), "2"), clientv3.OpPut(c.key("moves/2"), "2")).Commit(); err != nil {
		t.Fatal(err)
	}
	close(changed)
	until(t, "the transaction", k.Changed(), func() bool {
		v := values(k)
		if v["owners/2"] != v["moves/2"] {
			t.Fatalf("half of a transaction at revision %d: %v", k.Revision(), v)
		}
		return v["owners/2"] == "2"
	})
}

func TestARangeThatWasDroppedAndIsWatchedAgainIsOfTheRevisionOfTheOthers(t *testing.T) {
	c := dial(t, start(t))
	write := func(n int) {
		v := strconv.Itoa(n)
		_, err := c.etcd.Txn(t.Context()).Then(clientv3.OpPut(c.key("owners/1"), v), clientv3.OpPut(c.key("moves/1"), v), clientv3.OpPut(c.key("pins/1"), v)).Commit()
		if err != nil {
			t.Error(err)
		}
	}
	write(0)
	k := tracked(t, c, OwnerPrefix, MovePrefix, PinPrefix)
	const last = 100
	written := make(chan struct{})
	go func() {
		defer close(written)
		for n := range last {
			write(n + 1)
		}
	}()
	steps, all := 0, 0
	until(t, "the last transaction", k.Changed(), func() bool {
		switch steps++; steps % 4 {
		case 0:
			k.Remove(MovePrefix)
		case 1:
			k.Remove(PinPrefix)
		case 2:
			k.SetPrefixes(OwnerPrefix, MovePrefix+"1", PinPrefix)
		case 3:
			k.SetPrefixes(OwnerPrefix, MovePrefix, PinPrefix)
		}
		v := values(k)
		for key, is := range v {
			if is != v["owners/1"] {
				t.Fatalf("%s is not of the revision of the others: %v", key, v)
			}
		}
		if len(v) == 3 {
			all++
		}
		return v["owners/1"] == strconv.Itoa(last)
	})
	<-written // the answer may come after the event
	k.SetPrefixes(OwnerPrefix, MovePrefix, PinPrefix)
	until(t, "all ranges", k.Changed(), func() bool { return len(values(k)) == 3 })
	t.Logf("%d steps, %d with all ranges", steps, all)
}

// What etcd says in each order that it may say it in.
func TestAnAnswerCountsForWatchesThatWereCreatedBeforeItsQuestion(t *testing.T) {
	answer := func(revision int64) *pb.WatchResponse {
		return &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: revision}, WatchId: clientv3.InvalidWatchID}
	}
	created := func(revision int64) *pb.WatchResponse {
		return &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: revision}, Created: true}
	}
	const ask, create = "ask", "create" // instead of a response
	const yes, no = true, false
	for _, tt := range []struct {
		name  string
		steps []any // ask, create, or a response, followed by whether it is passed on
	}{
		{"asked after", []any{create, created(5), yes, ask, answer(5), yes}},
		{"asked before, answered after", []any{ask, create, created(5), yes, answer(5), no, ask, answer(5), yes}},
		{"asked before, of an older revision", []any{ask, ask, create, created(5), yes, answer(4), no, answer(5), no, ask, answer(5), yes}},
		{"asked before, never answered", []any{ask, ask, create, created(5), yes, ask, answer(5), no, ask, answer(5), no, ask, answer(5), yes}},
		{"answered before", []any{ask, answer(5), yes, create, created(5), yes, ask, answer(5), yes}},
		{"answered while it is created", []any{create, ask, answer(5), yes, created(5), yes, ask, answer(5), yes}},
		{"of a newer revision", []any{ask, ask, create, created(5), yes, ask, answer(6), yes, ask, answer(6), yes}},
		{"what a newer revision settles is open no longer", []any{
			ask, ask, create, created(5), yes, ask, answer(6), yes, create, created(6), yes, ask, answer(6), yes}},
		{"asked while it is created, and open when the next one is", []any{
			create, ask, ask, created(5), yes, answer(6), yes, create, created(6), yes, answer(6), no, ask, answer(6), yes}},
		{"two watches", []any{ask, create, created(5), yes, ask, create, created(6), yes, answer(5), no, answer(6), no, ask, answer(6), yes}},
		{"an older one than all, whatever was counted", []any{create, created(5), yes, answer(4), no}},
		{"events", []any{ask, create, created(5), yes, &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: 5}, WatchId: 1}, yes}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &watchStream{}
			for i, step := range tt.steps {
				switch m := step.(type) {
				case string:
					r := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}}
					if m == create {
						r = &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{}}}
					}
					s.asks(r)
				case *pb.WatchResponse:
					if want := tt.steps[i+1].(bool); s.holds(m) != want {
						t.Errorf("step %d: passed on: %t, want %t", i, !want, want)
					}
				}
			}
		})
	}
}
