// SPDX-License-Identifier: Apache-2.0

package proxytest

import (
	"syscall"
	"testing"
)

// ReportCPU makes a benchmark report the CPU time of an operation, from now until the
// function that it returns is called. Unlike the time on the clock, it does not count while
// other processes have the processors.
func ReportCPU(b *testing.B) (stop func()) {
	b.Helper()
	used := func() int64 {
		var u syscall.Rusage
		if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
			b.Fatal(err)
		}
		return u.Utime.Nano() + u.Stime.Nano()
	}
	before := used()
	return func() { b.ReportMetric(float64(used()-before)/float64(b.N), "cpu-ns/op") }
}
