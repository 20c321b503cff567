// Command egret-lab is a whole cluster on one machine, for people and scripts: `egret-lab up` builds it, `egret-lab
// help` lists what can be done with it and to it. The work is done by package lab; this package owns the flags, the
// signals and the exit status.
package main
