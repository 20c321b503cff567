// Package page is the status page: what `egret status`, describe and trace tell, in a browser, live. Package operator
// says what there is to tell; this one shows it. It owns nothing in the kernel or in etcd.
//
// The page is a few files, which are in the binary, and asks for nothing from elsewhere. The server sends the whole
// state once (/events, server-sent events), and then what changes, by kind and name. /state is the same state at a
// time; /trace, /describe and /search answer with what operator does, /trace by what agents say of their kernels, too;
// /traffic with what gateways count.
//
// Invariants:
//   - Agents are asked for the traffic of the egress IPs that somebody has on the screen, and of no others: their
//     gateways, each once in trafficEvery whoever looks, maxAsked at a time.
//   - Agents are asked for their kernels maxTraced at a time, and of no destination.
//   - Agents that were silent hold up one another alone.
//   - A request changes nothing: GET and HEAD alone, and no body is read.
//   - While nobody looks, nothing is read of etcd, nor computed.
//   - What a viewer costs is bounded: there are at most maxViewers, and one that does not read is dropped, and not
//     waited for; where there are more, those of the client that has most go. Of the questions of a client one at a
//     time is answered.
//   - Names and texts of others are text: the page builds no HTML from them, and the browser is told to run no script
//     but the page's own.
//   - A page of another site learns nothing: at a loopback address the Host has to be one, and requests of other sites
//     are refused.
//
// Who may look is not decided here but by who serves it: Local is for a loopback address, Access for others.
package page
