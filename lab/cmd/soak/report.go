// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"time"
)

// The targets.
const (
	mostResident   = 400 << 20
	mostFiles      = 2000
	mostGoroutines = 20_000
	mostDisk       = 1 << 30 // record_max_size, if it is not set
	mostLog        = 64 << 20
	mostSlower     = 2 // times
)

// report prints each measurement with its target, and reports whether all were met.
func report(before, peak usage, without, with times, lost []error) bool {
	const MiB = 1 << 20
	ms := func(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond)) }
	all := true
	line := func(what, without, with, target string, met bool) {
		verdict := "met"
		if !met {
			verdict, all = "missed", false
		}
		fmt.Printf("%-36s %14s %14s   %-22s %s\n", what, without, with, target, verdict)
	}
	fmt.Printf("\n%-36s %14s %14s   %s\n", "", "without", "with attacks", "target")
	mib := func(n int64) string { return fmt.Sprintf("%d MiB", n/MiB) }
	line("peak memory (RSS)", mib(before.resident), mib(peak.resident), "below "+mib(mostResident), peak.resident < mostResident)
	line("file descriptors", fmt.Sprint(before.files), fmt.Sprint(peak.files), fmt.Sprint("below ", mostFiles), peak.files < mostFiles)
	line("goroutines", fmt.Sprint(before.goroutines), fmt.Sprint(peak.goroutines), fmt.Sprint("below ", mostGoroutines), peak.goroutines < mostGoroutines)
	line("recordings", mib(before.disk), mib(peak.disk), "below "+mib(mostDisk), peak.disk < mostDisk)
	line("log", mib(before.log), mib(peak.log), "below "+mib(mostLog), peak.log < mostLog)
	line("gets of the others", fmt.Sprint(without.n), fmt.Sprint(with.n), "some", without.n > 0 && with.n > 0)
	line("  that failed", fmt.Sprint(without.failed), fmt.Sprint(with.failed), "none", with.failed == 0)
	line("  p50", ms(without.p50), ms(with.p50), fmt.Sprintf("at most %d times", mostSlower), with.p50 <= mostSlower*without.p50)
	line("  p99", ms(without.p99), ms(with.p99), "-", true)
	line("sessions and watches that were lost", "", fmt.Sprint(len(lost)), "none", len(lost) == 0)
	for _, err := range lost {
		fmt.Println("  ", err)
	}
	return all
}
