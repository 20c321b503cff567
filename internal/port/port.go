// Package port gives a test a TCP and UDP port for a server that chooses none by itself. Nothing of it reaches a
// binary.
package port

import (
	"fmt"
	"math/rand/v2"
	"net"
	"testing"
)

// The kernel gives out ports from 32768 on (net.ipv4.ip_local_port_range), to sockets that ask for any and to outgoing
// connections. What is below is taken by those only who name it.
const first, last = 12000, 31999

// Hold returns a port at which nobody listens and which no other test gets, in this process or another, until the test
// ends: whoever asks here holds an abstract socket of the port's name.
func Hold(t testing.TB) int {
	t.Helper()
	for range 1000 {
		port := first + rand.IntN(last-first+1)
		held, err := net.ListenUnix("unix", &net.UnixAddr{Name: fmt.Sprintf("@egret/test/port/%d", port)})
		if err != nil {
			continue // another test's
		}
		l, err := net.Listen("tcp", fmt.Sprint(":", port))
		if err != nil {
			held.Close()
			continue // somebody else's
		}
		l.Close()
		t.Cleanup(func() { held.Close() })
		return port
	}
	t.Fatal("no port is free")
	return 0
}
