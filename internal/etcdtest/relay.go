package etcdtest

import (
	"io"
	"net"
	"sync"
)

// state is what a relay does with its connections.
type state int

const (
	open   state = iota // pass everything on
	frozen              // keep the connections, pass nothing on
	cut                 // close the connections, old and new
)

// relay passes TCP connections on to a target that may change: the path of a socket.
type relay struct {
	listener net.Listener
	wg       sync.WaitGroup

	mu      sync.Mutex // guards what follows
	changed *sync.Cond // on mu: state changed
	state   state
	to      string // empty: nobody listens
	conns   map[net.Conn]bool
}

func newRelay() (*relay, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &relay{listener: l, conns: map[net.Conn]bool{}}
	r.changed = sync.NewCond(&r.mu)
	r.wg.Go(r.accept)
	return r, nil
}

func (r *relay) addr() string { return r.listener.Addr().String() }

// target makes the socket at path the end of new connections, and closes the old ones.
func (r *relay) target(path string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.to = path
	r.dropLocked()
}

func (r *relay) set(s state) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state = s
	if s == cut {
		r.dropLocked()
	}
	r.changed.Broadcast()
}

func (r *relay) dropLocked() {
	for c := range r.conns {
		c.Close()
	}
	clear(r.conns)
	r.changed.Broadcast()
}

func (r *relay) close() {
	r.listener.Close()
	r.set(cut)
	r.wg.Wait()
}

func (r *relay) accept() {
	for {
		c, err := r.listener.Accept()
		if err != nil {
			return // closed
		}
		r.wg.Go(func() { r.serve(c) })
	}
}

// serve passes on one connection until either end closes it.
func (r *relay) serve(client net.Conn) {
	defer client.Close()
	if !r.add(client) {
		return
	}
	defer r.remove(client)
	r.mu.Lock()
	to := r.to
	r.mu.Unlock()
	server, err := net.Dial("unix", to)
	if err != nil {
		return
	}
	defer server.Close()
	if !r.add(server) {
		return
	}
	defer r.remove(server)
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.pass(server, client)
	}()
	r.pass(client, server)
	<-done
}

// pass copies one direction, and closes both when it ends: neither end has a use for half a connection.
func (r *relay) pass(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	_, _ = io.Copy(to, reader{r, from}) // the end of a connection is what Cut is for
}

func (r *relay) add(c net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.state == cut || r.to == "" {
		return false
	}
	r.conns[c] = true
	return true
}

func (r *relay) remove(c net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, c)
	r.changed.Broadcast()
}

// reader holds back what it has read while the relay is frozen.
type reader struct {
	r    *relay
	conn net.Conn
}

func (d reader) Read(b []byte) (int, error) {
	n, err := d.conn.Read(b)
	d.r.mu.Lock()
	defer d.r.mu.Unlock()
	for d.r.state == frozen && d.r.conns[d.conn] {
		d.r.changed.Wait()
	}
	return n, err
}
