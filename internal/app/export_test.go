// SPDX-License-Identifier: Apache-2.0

package app

import "time"

// Periods returns Caddy's shutdown_delay and grace_period, as a knows them when Caddy exits.
func Periods(a *App) (delay, grace time.Duration) {
	s := a.newStop(func() {})
	return s.delay, s.grace
}

// Exit does what happens when Caddy exits with the config of a.
func Exit(a *App) { a.newStop(func() {}).run() }
